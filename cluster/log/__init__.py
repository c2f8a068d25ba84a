"""The event log: durable, ordered, idempotent, with user state in the same transaction.

sqlite.py   `EventLog`: append, read, offsets, user state, items, verification
commit.py   one writer thread that commits what many threads submit together
seeds.py    the past that is imported before the first event
schema.py   the tables, and connections to them
records.py  what goes in and out, and how an event becomes a row
"""

from cluster.log.records import Appended, Interaction, LoggedEvent, UserState, VerifyReport
from cluster.log.sqlite import EventLog

__all__ = ["Appended", "EventLog", "Interaction", "LoggedEvent", "UserState", "VerifyReport"]
