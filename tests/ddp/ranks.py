"""Runs a function on real gloo ranks: one process each, results back by rank."""

import multiprocessing
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """What `function(rank, world, *args)` returned on each rank; a failure on any rank fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dml.loop"])
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, world, port, function, args, results)) for r in range(world)]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world:
            try:
                rank, value, error = results.get(timeout=timeout)
            except queue.Empty:
                silent = sorted(set(range(world)) - set(found))
                raise AssertionError(
                    f"ranks {silent} died or hang, perhaps since ranks disagree on a collective"
                ) from None
            assert not error, f"rank {rank}: {error}"
            found[rank] = value
        for process in ranks:
            process.join(timeout)
    finally:
        for process in ranks:
            process.kill()
    return [found[rank] for rank in range(world)]


def _rank(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        results.put((rank, function(rank, world, *args), ""))
    except Exception:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()
