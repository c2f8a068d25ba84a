"""`recloop plan --serve` sizes replicas from the version itself, and says what it cannot know."""

import json

from cluster.cli import main


def plan(capsys, home, *flags):
    assert main(["plan", "--serve", "--json", "--home", str(home.path), *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_published_version_is_timed_and_replicas_follow_the_rate(versions, home, capsys):
    few, many = (plan(capsys, home, "--rate", str(rate)) for rate in (10, 20_000))
    assert (few["items"], few["users"], few["replicas"]) == (30, 4, 1)
    assert few["ranker_ms"] > 0
    assert many["replicas"] > 10
    assert many["replicas"] * many["requests_a_replica_per_s"] >= 20_000


def test_memory_follows_the_catalogue_part_by_part(versions, home, capsys):
    small, large = (plan(capsys, home, "--items", str(items)) for items in (10_000, 1_000_000))
    parts = {row["part"]: row["mib"] for row in large["parts"]}
    assert parts["item texts' vectors"] == round(1_000_000 * 384 * 4 / 2**20, 1)
    assert parts["index"] > 0
    assert {row["part"]: row["mib"] for row in small["parts"]}["index"] == 0
    assert abs(large["replica_mib"] - sum(parts.values())) < 2


def test_without_a_version_nothing_is_guessed_of_its_speed(home, capsys):
    told = plan(capsys, home, "--items", "1000", "--users", "10")
    assert "replicas" in told
    assert "publish a version" in told["replicas"]
    assert "ranker_ms" not in told
