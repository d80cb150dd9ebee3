"""Runs a function on real gloo ranks: one process each, results back by rank."""

import multiprocessing
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
    results = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(r, world, port, function, args, results)) for r in range(world)]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    try:
        for process in ranks:
            process.join(timeout)
            assert process.exitcode is not None, "a rank hangs: ranks disagree on a collective"
        while not results.empty():
            rank, value, error = results.get()
            assert not error, f"rank {rank}: {error}"
            found[rank] = value
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
