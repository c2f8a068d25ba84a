"""Groups of real gloo workers that learn online, the test's own process leading."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from training.online.part import follow
from training.online.workers import PATIENCE, Workers, open_store

Together = Callable[[int], contextlib.AbstractContextManager[Workers]]


def follow_leader(port: int, rank: int, count: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    follow(Workers.join(store, rank, count, "cpu"), torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Together:
    """Lead so many workers while a block lasts; the others are forked from a server that has imported everything."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.online.actor", "torchrec.distributed.model_parallel", "transformers"])

    @contextlib.contextmanager
    def lead(count: int) -> Iterator[Workers]:
        # TorchRec 1.8 agrees on something once a process, with the first group alone: these are many in one process.
        monkeypatch.setattr("torchrec.distributed.collective_utils._INITIALIZED", False)
        store, port = open_store("127.0.0.1", PATIENCE)
        others = [
            context.Process(target=follow_leader, args=(port, rank, count), daemon=True) for rank in range(1, count)
        ]
        for process in others:
            process.start()
        try:
            workers = Workers.join(store, 0, count, "cpu")
            yield workers
            workers.end()
            for process in others:
                process.join(30)
            assert [process.exitcode for process in others] == [0] * len(others)
        finally:
            for process in others:
                process.kill()
                process.join()
            dist.destroy_process_group()

    return lead
