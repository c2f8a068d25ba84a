"""Free memory, as the machine or a container's limit has it."""

from pathlib import Path

import psutil

from cluster.memory import free_in_cgroup, free_memory


def write(folder: Path, **numbers: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in numbers.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def own(folder: Path, line: str) -> Path:
    (folder / "own").write_text(line)
    return folder / "own"


def test_free_memory_is_at_most_the_machines() -> None:
    assert 0 < free_memory() <= psutil.virtual_memory().total


def test_without_limits_there_is_nothing_to_say(tmp_path: Path) -> None:
    write(tmp_path, memory__max="max", memory__current=5)
    assert free_in_cgroup(tmp_path, own(tmp_path, "0::/\n")) is None


def test_a_containers_limit_leaves_what_is_not_used_and_what_is_only_cached(tmp_path: Path) -> None:
    write(tmp_path, memory__max=100, memory__current=70, memory__stat="anon 50\ninactive_file 15")
    assert free_in_cgroup(tmp_path, tmp_path / "absent") == 45


def test_the_tightest_limit_above_the_process_counts(tmp_path: Path) -> None:
    write(tmp_path / "pod", memory__max=40, memory__current=30)
    write(tmp_path / "pod" / "box", memory__max=100, memory__current=20)
    assert free_in_cgroup(tmp_path, own(tmp_path, "0::/pod/box\n")) == 10


def test_limits_of_version_1_count_as_well(tmp_path: Path) -> None:
    group = tmp_path / "memory" / "pod"
    write(group, memory__limit_in_bytes=90, memory__usage_in_bytes=60, memory__stat="total_inactive_file 5")
    assert free_in_cgroup(tmp_path, own(tmp_path, "4:memory:/pod\n0::/\n")) == 35
