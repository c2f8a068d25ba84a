"""What is left out of learning: as a version's metrics state it."""

from training.online.exclusions import Exclusions


def test_a_version_that_states_nothing_leaves_nothing_out():
    assert Exclusions.read({}) == Exclusions()
    assert Exclusions().metrics() == {}
    assert not Exclusions().covers(1, "u1")


def test_ranges_hold_both_ends_and_users_up_to_their_last():
    left_out = Exclusions(ranges=frozenset({(3, 5)}), users={"u1": 8})
    assert [left_out.covers(seq, "u2") for seq in (2, 3, 5, 6)] == [False, True, True, False]
    assert [left_out.covers(seq, "u1") for seq in (1, 8, 9)] == [True, True, False]
    assert not any(left_out.covers(seq, user_id) for seq in (0, -7) for user_id in ("u1", "u2"))  # training's history


def test_what_is_stated_is_read_back():
    left_out = Exclusions(ranges=frozenset({(3, 5), (1, 2)}), users={"b": 8, "a": 1})
    assert Exclusions.read(left_out.metrics()) == left_out


def test_joined_leaves_out_what_either_does_and_of_a_user_the_longer():
    one, other = Exclusions(ranges=frozenset({(1, 2)}), users={"u": 3}), Exclusions(users={"u": 9, "v": 1})
    assert one.joined(other) == Exclusions(ranges=frozenset({(1, 2)}), users={"u": 9, "v": 1})
