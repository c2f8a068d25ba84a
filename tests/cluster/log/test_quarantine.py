"""Held, released, learned once, or dropped; whoever asks, in whatever process."""

import pytest

from cluster.errors import EngineError
from cluster.log.quarantine import Quarantine, Quarantined


def entry(seq: int, user_id: str = "u", item_id: str = "i") -> Quarantined:
    return Quarantined(seq=seq, user_id=user_id, item_id=item_id, kind="click", score=0.5, reasons=("repeats",))


@pytest.fixture
def quarantine(tmp_path):
    found = Quarantine(tmp_path / "events.sqlite")
    yield found
    found.close()


def test_what_is_held_is_found_again_by_another_process(quarantine, tmp_path):
    quarantine.add([entry(2), entry(1, "v")])
    other = Quarantine(tmp_path / "events.sqlite")
    assert other.find() == [entry(1, "v"), entry(2)]
    other.close()


def test_it_is_found_by_user_item_and_number(quarantine):
    quarantine.add([entry(1, "u", "i"), entry(2, "v", "i"), entry(3, "u", "j")])
    assert [e.seq for e in quarantine.find(user_id="u")] == [1, 3]
    assert [e.seq for e in quarantine.find(item_id="i", first_seq=2)] == [2]
    assert [e.seq for e in quarantine.find(limit=1)] == [1]


def test_holding_again_does_not_undo_a_release(quarantine):
    quarantine.add([entry(1)])
    quarantine.release([1])
    quarantine.add([entry(1)])
    assert quarantine.find()[0].state == "released"


def test_only_what_is_held_is_released_or_dropped(quarantine):
    quarantine.add([entry(1), entry(2)])
    quarantine.drop([1])
    quarantine.release([1, 2, 3])
    quarantine.drop([2])
    assert [e.state for e in quarantine.find()] == ["dropped", "released"]
    quarantine.mark_learned([1, 2])
    assert quarantine.counts() == {"held": 0, "released": 0, "learned": 1, "dropped": 1}


def test_a_file_that_is_something_else_is_said(tmp_path):
    (tmp_path / "events.sqlite.quarantine").write_bytes(b"not a database" * 100)
    with pytest.raises(EngineError, match=r"events\.sqlite\.quarantine: "):
        Quarantine(tmp_path / "events.sqlite")
