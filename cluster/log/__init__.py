"""The event log: durable, ordered, idempotent, with user state in the same transaction.

sqlite.py   `EventLog`: append, read, offsets, user state, items, verification
commit.py   one writer thread that commits what many threads submit together
checkpoints.py   what keeps the write-ahead log short beside it
seeds.py    the past that is imported before the first event
schema.py   the tables, and connections to them
records.py  what goes in and out, and how an event becomes a row
kafka.py    `KafkaLog`: the same on a topic that every node folds
state.py    user state: the question, and the file's answer
shared.py, redis.py   user state that nodes share: when an append is acked, who answers; what Redis holds
segments.py, sealing.py, retention.py                   older events in Parquet files
verification.py, repair.py, salvage.py, pages.py, wal.py, swap.py   is it sound, and what a damaged file still holds
transfer.py events out of a log, into a dataset or another log
"""

from cluster.log.records import Appended, Interaction, LoggedEvent, UserState, VerifyReport
from cluster.log.sqlite import EventLog

__all__ = ["Appended", "EventLog", "Interaction", "LoggedEvent", "UserState", "VerifyReport"]
