"""Learning from the event log while it serves.

actor.py      the Ray actor: read, learn, publish, for as long as it lives
learner.py    what a step of that is, and what becomes of it: a delta, a rollback, a new version
model.py      a version taken up for further training, and what changed in it
part.py       what one worker holds of it
workers.py    several workers that learn it together: who leads, how the others hear
shared_rows.py  rows that they hold between them
shared_towers.py  predictions of which each makes a part
sent.py       what replicas have of it
sequences.py  histories from the log as sequences to learn from
user_rows.py  a user's own row follows each of their interactions
predictions.py  what weights said of interactions beforehand
join.py       impressions with the feedback that followed
impressions.py  what of the seen is chosen, apart from where it was shown
intake.py     who is suspicious, and how much an event weighs
admission.py  events on their way: judged, held in quarantine, let in
segments.py   which of them are judged apart
guard.py      progressive validation: whether what was learned may be served
surprise.py   whether the newest events are like those before
drift.py      whether what comes in, or what is made of it, has changed
exclusions.py what of the log is not learned from
undo.py       a version as if some of the log had not been learned from
regrow.py     such a version, and one without what is damaged: from an earlier state
"""
