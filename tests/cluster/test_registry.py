"""Publishing in one step, chains of deltas, the pointer, and what corruption looks like."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from cluster.errors import CorruptVersionError, NoVersionError, RegistryError
from cluster.manifest import VersionRef
from cluster.registry import Registry
from cluster.storage import Storage

PUBLISHER = textwrap.dedent(
    """
    import sys, torch
    from cluster.registry import Registry
    registry = Registry(sys.argv[1])
    for number in range(int(sys.argv[2])):
        draft = registry.draft_version()
        draft.add_tensors("tables", {"rows": torch.full((1_000,), float(number))})
        draft.add_text("recipe.toml", "seed = 1")
        print(draft.publish(offset=number, metrics={}), flush=True)
    """
)


@pytest.fixture(params=["folder", "object_store"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry" if request.param == "folder" else Storage("mock://bucket/registry"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def publish_version(registry, offset=0, **options):
    draft = registry.draft_version()
    draft.add_tensors("tables", {"rows": torch.arange(6, dtype=torch.float32).reshape(2, 3)})
    draft.add_table("items", pa.table({"item_id": ["m1", "m2"]}))
    draft.add_text("recipe.toml", "seed = 1\n")
    return draft.publish(offset=offset, metrics={"ndcg_at_10": 0.125}, **options)


def publish_delta(registry, first_seq, last_seq, base=1, **options):
    draft = registry.draft_delta(base)
    draft.add_tensors("rows", {"changed": torch.tensor([first_seq, last_seq])})
    return draft.publish(first_seq, last_seq, **options)


def start_publisher(folder, count):
    command = [sys.executable, "-c", PUBLISHER, str(folder), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_an_empty_registry_has_no_version(registry):
    with pytest.raises(NoVersionError, match="no version is published yet"):
        registry.current()
    assert registry.versions() == []
    assert registry.history() == []


def test_what_is_published_is_read_back_equal(registry):
    ref = publish_version(registry, offset=7)
    reader = registry.open_version(1)
    assert ref == registry.current() == VersionRef(1, 0)
    assert torch.equal(reader.tensors("tables")["rows"], torch.tensor([[0.0, 1, 2], [3, 4, 5]]))
    assert reader.table("items")["item_id"].to_pylist() == ["m1", "m2"]
    assert reader.count_rows("items") == 2
    assert reader.text("recipe.toml") == "seed = 1\n"
    assert reader.manifest.metrics == {"ndcg_at_10": 0.125}
    assert reader.manifest.last_seq == 7
    assert set(reader.manifest.files) == {"tables.safetensors", "items.parquet", "recipe.toml"}


def test_a_draft_is_invisible_until_published(registry):
    draft = registry.draft_version()
    draft.add_text("recipe.toml", "")
    assert registry.versions() == []
    with pytest.raises(RegistryError, match=r"1\.0 is not published"):
        registry.open_version(1)


def test_a_folder_without_manifest_is_invisible_and_its_number_is_not_reused(folder):
    registry = Registry(folder)
    publish_version(registry)
    half = folder / "versions" / "000002"
    half.mkdir()
    (half / "tables.safetensors").write_bytes(b"half")
    assert [manifest.ref.version for manifest in registry.versions()] == [1]
    assert publish_version(registry) == VersionRef(3)
    assert (half / "tables.safetensors").read_bytes() == b"half"


def test_an_abandoned_draft_can_be_pruned_and_a_published_version_cannot(folder):
    registry = Registry(folder)
    publish_version(registry)
    registry.draft_version().add_text("recipe.toml", "")
    assert registry.prune() == ()
    assert len(registry.prune(older_than_s=0)) == 1
    assert registry.open_version(1).text("recipe.toml")


def test_a_dropped_version_is_gone_with_its_deltas_and_its_number_is_not_given_again(registry):
    for _ in range(3):
        publish_version(registry)
    registry.drop_version(2)
    assert [manifest.ref.version for manifest in registry.versions()] == [1, 3]
    assert publish_version(registry).version == 4
    with pytest.raises(RegistryError, match="not published"):
        registry.open_version(2)


def test_dropping_deltas_keeps_their_base(registry):
    publish_version(registry, offset=10)
    publish_delta(registry, 11, 20)
    publish_delta(registry, 21, 30)
    publish_version(registry, offset=30)
    assert registry.drop_deltas(1) == 2
    assert registry.deltas(1) == []
    assert registry.open_version(1).manifest.last_seq == 10


def test_what_is_promoted_and_what_is_newest_cannot_be_dropped(registry):
    publish_version(registry, offset=0)
    publish_delta(registry, 1, 2)
    with pytest.raises(RegistryError, match="promoted"):
        registry.drop_deltas(1)
    publish_version(registry)
    registry.promote(VersionRef(1))
    with pytest.raises(RegistryError, match="newest"):
        registry.drop_version(2)
    assert registry.current() == VersionRef(1)


def test_deltas_are_numbered_from_one_and_move_the_pointer(registry):
    publish_version(registry, offset=10)
    assert [publish_delta(registry, 11, 20), publish_delta(registry, 21, 30)] == [VersionRef(1, 1), VersionRef(1, 2)]
    assert registry.current() == VersionRef(1, 2)
    chain = registry.deltas(1)
    assert [(manifest.first_seq, manifest.last_seq) for manifest in chain] == [(11, 20), (21, 30)]
    assert chain[1].parent_sha256 == chain[0].sha256
    assert chain[0].parent_sha256 == registry.open_version(1).manifest.sha256
    assert registry.deltas(1, after=1) == chain[1:]
    assert registry.open_delta(1, 2).tensors("rows")["changed"].tolist() == [21, 30]


@pytest.mark.parametrize("events", [(10, 20), (5, 9), (11, 9), (12, 20)])
def test_a_delta_that_would_learn_an_event_twice_or_leave_one_out_is_refused(registry, events):
    publish_version(registry, offset=10)
    with pytest.raises(RegistryError, match="start at 11"):
        publish_delta(registry, *events)
    assert registry.deltas(1) == []


def test_a_delta_without_events_is_allowed(registry):
    publish_version(registry, offset=10)
    assert publish_delta(registry, 11, 10) == VersionRef(1, 1)
    assert publish_delta(registry, 11, 12) == VersionRef(1, 2)


def test_a_rollback_holds_against_later_deltas(registry):
    publish_version(registry)
    publish_delta(registry, 1, 1)
    registry.promote(VersionRef(1, 0), reason="drift")
    publish_delta(registry, 2, 2)
    assert registry.current() == VersionRef(1, 0)


def test_a_version_published_from_where_the_pointer_is_takes_it_along(registry):
    publish_version(registry)
    publish_delta(registry, 1, 1)
    assert publish_version(registry, promote_from=VersionRef(1, 1)) == registry.current() == VersionRef(2)


def test_a_version_published_from_where_the_pointer_is_no_more_waits_for_promotion(registry):
    publish_version(registry)
    publish_delta(registry, 1, 1)
    registry.promote(VersionRef(1), reason="drift")
    assert publish_version(registry, promote_from=VersionRef(1, 1)) == VersionRef(2)
    assert registry.current() == VersionRef(1)
    assert len(registry.history()) == 3


def test_a_version_can_be_published_without_being_served(registry):
    publish_version(registry)
    publish_version(registry, promote=False, parent=VersionRef(1))
    publish_delta(registry, 1, 1, base=2)
    assert registry.current() == VersionRef(1)
    assert registry.open_version(2).manifest.parent == VersionRef(1)
    assert registry.open_version(2).manifest.parent_sha256 == registry.open_version(1).manifest.sha256


def test_history_names_every_move_with_its_reason(registry):
    publish_version(registry)
    publish_delta(registry, 1, 1)
    registry.promote(VersionRef(1, 0), reason="drift")
    moves = [(str(move.previous), str(move.ref), move.reason) for move in registry.history()]
    assert moves == [("None", "1.0", "published"), ("1.0", "1.1", "delta"), ("1.1", "1.0", "drift")]


def test_old_moves_from_delta_to_delta_are_forgotten_once_there_are_many(registry, monkeypatch):
    monkeypatch.setattr("cluster.pointer.LONG_RECORD_BYTES", 2_000)
    monkeypatch.setattr("cluster.pointer.NEWEST_MOVES", 5)
    publish_version(registry)
    registry.promote(VersionRef(1), "chosen")
    for seq in range(1, 61):
        registry.draft_delta(1).publish(seq, seq)
    reasons = [move.reason for move in registry.history()]
    assert reasons[:2] == ["published", "chosen"]
    assert 5 <= reasons.count("delta") < 30
    assert registry.history()[-1].ref == registry.current() == VersionRef(1, 60)


def test_a_move_torn_by_a_crash_is_left_out_of_the_history(folder):
    registry = Registry(folder)
    publish_version(registry)
    with (folder / "promotions.jsonl").open("ab") as stream:
        stream.write(b'{"at_us": 1')
    assert len(registry.history()) == 1
    registry.promote(VersionRef(1))
    assert len(registry.history()) == 2


def test_what_was_never_published_cannot_be_promoted(registry):
    publish_version(registry)
    with pytest.raises(RegistryError, match=r"2\.0 is not published; versions here: 1"):
        registry.promote(VersionRef(2))
    assert registry.current() == VersionRef(1)


def test_tensors_of_any_type_and_shape_come_back_aligned(registry):
    written = {
        "matrix": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        "scalar": torch.tensor(3.0),
        "no rows": torch.empty(0, 4),
        "int8": torch.tensor([[-3, 127]], dtype=torch.int8),
        "int64": torch.arange(7),
        "bool": torch.tensor([True, False, True]),
        "float16": torch.tensor([0.5, 2.0, 3.0]).half(),
        "bfloat16": torch.tensor([0.5, 2.0, 3.0]).bfloat16(),
    }
    draft = registry.draft_version()
    draft.add_tensors("tables", written)
    read = registry.open_version(draft.publish(offset=0, metrics={}).version).tensors("tables")
    assert read.keys() == written.keys()
    assert [name for name, tensor in written.items() if read[name].dtype != tensor.dtype] == []
    assert [name for name, tensor in written.items() if not torch.equal(read[name], tensor)] == []
    assert {tensor.data_ptr() % 64 for tensor in read.values()} == {0}


def test_a_paced_reader_pauses_before_each_file(registry):
    publish_version(registry, offset=7)
    pauses = []
    reader = registry.paced(lambda: pauses.append("pause")).open_version(1)
    assert pauses == []
    assert torch.equal(reader.tensors("tables")["rows"], registry.open_version(1).tensors("tables")["rows"])
    reader.text("recipe.toml")
    assert pauses == ["pause", "pause"]


@pytest.mark.parametrize("name", ["tables.safetensors", "items.parquet", "recipe.toml"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named(folder, name, damage):
    registry = Registry(folder)
    publish_version(registry)
    path = folder / "versions" / "000001" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "flip":
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    reader = registry.open_version(1)
    read = {"tables.safetensors": reader.tensors, "items.parquet": reader.table, "recipe.toml": reader.text}[name]
    with pytest.raises(CorruptVersionError, match=name):
        read(name if name == "recipe.toml" else name.partition(".")[0])


@pytest.mark.parametrize("position", range(0, 600, 37))
def test_any_flipped_bit_of_a_manifest_is_noticed(folder, position):
    registry = Registry(folder)
    publish_version(registry)
    path = folder / "versions" / "000001" / "manifest.json"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(RegistryError, match=r"000001/manifest\.json"):
        registry.open_version(1)


def test_a_truncated_manifest_is_named(folder):
    registry = Registry(folder)
    publish_version(registry)
    path = folder / "versions" / "000001" / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptVersionError, match=r"000001/manifest\.json"):
        registry.versions()


def test_a_delta_swapped_for_another_breaks_the_chain(folder):
    registry, other = Registry(folder), Registry(folder.with_name("other"))
    publish_version(registry)
    publish_version(other)
    for target, last_seq in ((registry, 5), (other, 6)):
        publish_delta(target, 1, last_seq)
        publish_delta(target, last_seq + 1, 8)
    stolen = folder.with_name("other") / "versions/000001/deltas/000002/manifest.json"
    (folder / "versions/000001/deltas/000002/manifest.json").write_bytes(stolen.read_bytes())
    with pytest.raises(CorruptVersionError, match=r"deltas/000002.*not a child of 1\.1"):
        registry.deltas(1)


def test_a_missing_link_is_named(folder):
    registry = Registry(folder)
    publish_version(registry)
    for seq in (1, 2, 3):
        publish_delta(registry, seq, seq)
    (folder / "versions/000001/deltas/000002/manifest.json").unlink()
    with pytest.raises(CorruptVersionError, match=r"deltas/000002/manifest\.json: missing"):
        registry.deltas(1)


def test_a_broken_pointer_is_named_and_mended_by_promoting(folder):
    registry = Registry(folder)
    publish_version(registry)
    (folder / "current.json").write_bytes(b'{"version": 1')
    with pytest.raises(CorruptVersionError, match=r"current\.json"):
        registry.current()
    registry.promote(VersionRef(1))
    assert registry.current() == VersionRef(1)


@pytest.mark.parametrize("name", ["manifest.json", "../escape", "a/b", "", ".hidden"])
def test_a_draft_refuses_names_that_are_not_plain(registry, name):
    with pytest.raises(RegistryError, match="plain"):
        registry.draft_version().add_text(name, "")


def test_a_draft_refuses_the_same_file_twice(registry):
    draft = registry.draft_version()
    draft.add_text("recipe.toml", "1")
    with pytest.raises(RegistryError, match="unused"):
        draft.add_text("recipe.toml", "2")


def test_metrics_must_be_finite_json(registry):
    with pytest.raises(RegistryError, match="metrics"):
        registry.draft_version().publish(offset=0, metrics={"auc": float("nan")})
    assert registry.versions() == []


def test_metrics_with_tuples_and_numbers_as_keys_read_back(registry):
    registry.draft_version().publish(offset=0, metrics={10: (1, 2), 9: 1e-7})
    assert registry.open_version(1).manifest.metrics == {"10": [1, 2], "9": 1e-7}


def test_a_file_that_is_not_part_of_the_version_is_named(registry):
    publish_version(registry)
    with pytest.raises(RegistryError, match=r"adapter\.safetensors: not part of 1\.0"):
        registry.open_version(1).tensors("adapter")


def test_the_pointer_is_whole_while_it_moves(folder):
    registry = Registry(folder)
    refs = {publish_version(registry), publish_delta(registry, 1, 1)}
    done = threading.Event()
    seen = set()

    def read_until_done():
        while not done.is_set():
            seen.add(registry.current())

    reader = threading.Thread(target=read_until_done)
    reader.start()
    for turn in range(100):
        registry.promote(VersionRef(1, turn % 2))
    done.set()
    reader.join()
    assert seen <= refs


def test_two_processes_publishing_at_once_clobber_nothing(folder):
    publishers = [start_publisher(folder, 10) for _ in range(2)]
    published = [publisher.communicate(timeout=60)[0].split() for publisher in publishers]
    assert sorted(int(ref.partition(".")[0]) for refs in published for ref in refs) == list(range(1, 21))
    registry = Registry(folder)
    assert len(registry.versions()) == len(registry.history()) == 20
    for number in range(1, 21):
        registry.open_version(number).tensors("tables")


def test_a_publisher_killed_at_any_moment_leaves_only_whole_versions(folder):
    registry = Registry(folder)
    acked = []
    for round_number in range(3):
        publisher = start_publisher(folder, 10_000)
        assert publisher.stdout is not None
        acked += [publisher.stdout.readline() for _ in range(5)]
        time.sleep(0.003 * round_number)
        os.kill(publisher.pid, signal.SIGKILL)
        acked += publisher.stdout.read().splitlines()
        publisher.stdout.close()
        publisher.wait()
    versions = [manifest.ref for manifest in registry.versions()]
    assert {ref.strip() for ref in acked if ref.strip()} <= {str(ref) for ref in versions}
    assert registry.current() in versions
    for ref in versions:
        reader = registry.open_version(ref.version)
        assert reader.tensors("tables")["rows"].shape == (1_000,)
        assert reader.text("recipe.toml") == "seed = 1"
    registry.prune(older_than_s=0)
    assert publish_version(registry).version == versions[-1].version + 1


def test_the_files_on_disk_are_those_the_contract_names(folder):
    registry = Registry(folder)
    publish_version(registry)
    publish_delta(registry, 1, 4)
    version = folder / "versions" / "000001"
    assert sorted(path.name for path in version.iterdir()) == [
        "deltas",
        "items.parquet",
        "manifest.json",
        "recipe.toml",
        "tables.safetensors",
    ]
    assert json.loads((folder / "current.json").read_text()) == {"version": 1, "delta": 1}
    entry = json.loads((version / "manifest.json").read_text())["files"]["recipe.toml"]
    assert entry["bytes"] == len("seed = 1\n")
    assert len(entry["sha256"]) == 64


@pytest.mark.parametrize(("text", "ref"), [("1", VersionRef(1, 0)), ("1.37", VersionRef(1, 37))])
def test_a_name_is_read_as_it_is_written(text, ref):
    assert VersionRef.parse(text) == VersionRef.parse(str(ref)) == ref


@pytest.mark.parametrize("text", ["", "v1", "1.x", "1.2.3", "-1"])
def test_what_is_not_a_name_is_refused(text):
    with pytest.raises(RegistryError, match="VERSION"):
        VersionRef.parse(text)
