"""What lives as a server gets ready is no longer searched for garbage; what comes later still is."""

import subprocess
import sys

PROGRAM = """
import gc, weakref
from cluster.heap import settle_heap

class Node: ...

def lost():
    node = Node()
    node.itself = node
    return weakref.ref(node)

before, kept = lost(), [Node() for _ in range(1000)]
settle_heap()
searched = {id(found) for found in gc.get_objects()}
assert before() is None, "garbage of before is gone, not kept for good"
assert not searched & {id(node) for node in kept}
later = lost()
gc.collect()
assert later() is None
"""


def test_a_settled_heap_is_not_searched_again_and_later_garbage_is_found() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
