"""Bytes under names: the same contract on a folder and on an object store, and atomicity on the folder."""

import hashlib
import threading
from pathlib import Path

import pytest

from cluster.errors import EngineError
from cluster.storage import SCRATCH, Storage


@pytest.fixture(params=["folder", "file_uri", "object_store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    uris = {"folder": tmp_path / "root", "file_uri": f"file://{tmp_path}/root", "object_store": "mock://bucket/root"}
    return Storage(uris[request.param])


def test_what_is_written_is_read(storage):
    storage.write("a/b/c.bin", b"\x00one")
    storage.write("a/b/c.bin", b"\x00two")
    assert storage.read("a/b/c.bin") == b"\x00two"
    assert storage.sha256("a/b/c.bin") == hashlib.sha256(b"\x00two").hexdigest()
    assert storage.exists("a/b/c.bin")
    assert storage.exists("a/b")
    assert storage.list("a") == ["b"]
    assert storage.list("a/b") == ["c.bin"]


def test_absent_names_are_absent(storage):
    assert not storage.exists("nothing")
    assert storage.list("nothing") == []
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")


def test_a_scratch_folder_becomes_the_target_and_is_gone(storage):
    scratch = storage.new_scratch_folder()
    storage.write(f"{scratch}/part", b"1")
    storage.write(f"{scratch}/last", b"2")
    storage.place(scratch, "numbered/000001", last="last")
    assert storage.list("numbered/000001") == ["last", "part"]
    assert not storage.exists(scratch)


def test_a_taken_target_is_never_overwritten(storage):
    storage.write("numbered/000001/file", b"first")
    scratch = storage.new_scratch_folder()
    storage.write(f"{scratch}/file", b"second")
    with pytest.raises(FileExistsError, match="numbered/000001"):
        storage.place(scratch, "numbered/000001", last="file")
    assert storage.read("numbered/000001/file") == b"first"


def test_lines_are_appended_in_order(storage):
    for line in ("one", "two", "three"):
        storage.append_line("lines", line)
    assert storage.read("lines") == b"one\ntwo\nthree\n"


def test_a_line_torn_by_a_crash_is_cut_off_by_the_next_one(tmp_path):
    (tmp_path / "lines").write_bytes(b"one\nha")
    Storage(tmp_path).append_line("lines", "two")
    assert (tmp_path / "lines").read_bytes() == b"one\ntwo\n"


def test_clearing_scratch_removes_only_what_is_old_enough(tmp_path):
    storage = Storage(tmp_path)
    storage.write(f"{SCRATCH}/draft/file", b"1")
    (tmp_path / SCRATCH / "left.tmp").write_bytes(b"half")
    assert storage.clear_scratch(older_than_s=60) == ()
    assert storage.clear_scratch(older_than_s=0) == (f"{SCRATCH}/draft", f"{SCRATCH}/left.tmp")
    assert storage.list(SCRATCH) == []


def test_a_reader_sees_old_or_new_bytes_and_nothing_between(tmp_path):
    storage = Storage(tmp_path)
    contents = [bytes([letter]) * 200_000 for letter in b"ab"]
    storage.write("file", contents[0])
    done = threading.Event()
    seen = set()

    def read_until_done():
        while not done.is_set():
            seen.add(storage.read("file"))

    reader = threading.Thread(target=read_until_done)
    reader.start()
    for turn in range(100):
        storage.write("file", contents[turn % 2])
    done.set()
    reader.join()
    assert seen <= set(contents)
    assert storage.list(SCRATCH) == []


def test_the_lock_excludes_another_holder(tmp_path):
    first, second = Storage(tmp_path), Storage(tmp_path)
    entered = threading.Event()

    def enter():
        with second.lock():
            entered.set()

    with first.lock():
        waiter = threading.Thread(target=enter)
        waiter.start()
        assert not entered.wait(0.1)
    assert entered.wait(5)
    waiter.join()


def test_an_unknown_uri_is_named():
    with pytest.raises(EngineError, match="nosuch://bucket"):
        Storage("nosuch://bucket/root")
