"""The service under load beside the model alone and a plain server: `python -m benchmarks.serve_load`.

Real encoders with random weights at 224 px on JPEGs of 500 x 375 pixels; a replica has one CPU.

bare        decoding and embedding in one process a replica, all at once, without any server: images/s at the best batch
serve       python -m serve.app, its client in a process of its own: images/s of 32 connections with 16 images a request
            and with 1, as a share of bare; before and after it the bare model again, since the machine changes
plain       FastAPI on uvicorn with the same model and a lock around it, asked in the same way
cpu         milliseconds of CPU an image, in which other work on the machine shows less: of the bare model, and of the
            replicas and of Ray Serve's proxy (of the whole process of the plain server)
latency     of 1 image over 1 connection beyond decoding and the forward pass of one image, and at 70 % of the peak rate
            with requests at random times (1 image each)
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.loader import photograph

CONNECTIONS, IMAGES = 32, 16
BOUNDARY = "xxxxxxxxxxxxxxxx"
HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", "Accept": "application/x-npy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "vit_small_patch16_224"])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--server", choices=["serve", "plain", "both"], default="both")
    parser.add_argument("--as", dest="role", choices=["client", "bare", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--with", dest="given", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        given = json.loads(options.given)
        print(json.dumps({"client": client, "bare": bare, "plain": plain}[options.role](**given)), flush=True)
        return
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs, {options.seconds:g} s a measurement")
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(write(Path(scratch) / name.partition("_")[0], name))
            for replicas in options.replicas:
                if options.server != "plain":
                    measure(name, folder, "serve", replicas, options.seconds)
            if options.server != "serve":
                measure(name, folder, "plain", 1, options.seconds)


def measure(name: str, folder: str, kind: str, replicas: int, seconds: float) -> None:
    """One server, beside the bare model before and after."""
    before = bare_rate(folder, replicas, seconds / 4)
    with server(folder, kind, replicas) as (url, process):
        ask("client", url=url, connections=4, images=IMAGES, seconds=3)  # warm
        start = spent(process)
        many = ask("client", url=url, connections=CONNECTIONS, images=IMAGES, seconds=seconds)
        middle = spent(process)
        single = ask("client", url=url, connections=CONNECTIONS, images=1, seconds=seconds)
        end = spent(process)
        alone = ask("client", url=url, connections=1, images=1, seconds=seconds / 2)
        rate = 0.7 * single["rate"]
        busy = ask("client", url=url, connections=CONNECTIONS, images=1, seconds=seconds, arrivals=rate)
    after = bare_rate(folder, replicas, seconds / 4)
    best = statistics.median([before["rate"], after["rate"]])
    added = alone["p50"] - statistics.median([before["one"], after["one"]])
    cpu = "; ".join(
        f"{what} " + " + ".join(f"{1000 * (to[part] - since[part]) / answers['images']:.1f} {part}" for part in since)
        for what, since, to, answers in (
            (f"{CONNECTIONS} x {IMAGES}", start, middle, many),
            (f"{CONNECTIONS} x 1", middle, end, single),
        )
    )
    print(
        f"{name:22} {kind:5} x {replicas}: bare {before['rate']:.1f} {after['rate']:.1f} images/s (batch "
        f"{before['batch']}); {CONNECTIONS} x {IMAGES} {many['rate']:.1f} ({many['rate'] / best:.2f}); "
        f"{CONNECTIONS} x 1 {single['rate']:.1f} ({single['rate'] / best:.2f}); "
        f"1 x 1 p50 {alone['p50']:.1f} ms, {added:+.1f} beyond the model; "
        f"at 70 % p50 {busy['p50']:.0f} p99 {busy['p99']:.0f} ms ({busy['p99'] / busy['p50']:.1f} x); "
        f"refused {sum(each['refused'] for each in (many, single, alone, busy))}; "
        f"CPU ms an image: bare {before['cpu']:.1f} {after['cpu']:.1f}; {cpu}",
        flush=True,
    )


def bare_rate(folder: str, processes: int, seconds: float) -> dict[str, float]:
    """The sum over as many processes at once, and the median milliseconds of one image."""
    started = [spawn("bare", folder=folder, seconds=seconds) for _ in range(processes)]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    return {
        "rate": sum(each["rate"] for each in found),
        "one": statistics.median(each["one"] for each in found),
        "cpu": statistics.median(each["cpu"] for each in found),
        "batch": found[0]["batch"],
    }


def spent(process: psutil.Process) -> dict[str, float]:
    """Seconds of CPU so far of a server's replicas and its proxy; of a server of one process, of that."""
    parts = {"replica": 0.0, "proxy": 0.0}
    for child in process.children(recursive=True):
        for part, name in (("replica", "ray::ServeReplica"), ("proxy", "ray::ProxyActor")):
            if " ".join(child.cmdline()).startswith(name):
                parts[part] += sum(child.cpu_times()[:2])
    return parts if any(parts.values()) else {"process": sum(process.cpu_times()[:2])}


def bare(folder: str, seconds: float) -> dict[str, float]:
    """Decoding and embedding on one thread."""
    import torch

    from serve.model import CheckpointEmbedder

    torch.set_num_threads(1)
    model = CheckpointEmbedder(Path(folder), "bare", "1")
    files = [photograph(seed) for seed in range(16)]

    def run(size: int) -> float:
        start = time.perf_counter()
        model.embed([model.decode(files[index % len(files)]) for index in range(size)])
        return time.perf_counter() - start

    rates: dict[int, float] = {}
    cpu: dict[int, float] = {}
    for size in (1, 4, 8, 16, 32):
        model.batch = size
        run(size)
        until, used, times = time.perf_counter() + seconds / 4, time.process_time(), [run(size)]
        while time.perf_counter() < until:
            times.append(run(size))
        rates[size] = size / statistics.median(times)
        cpu[size] = 1000 * (time.process_time() - used) / (size * len(times))
    best = max(rates, key=lambda size: rates[size])
    return {"rate": rates[best], "batch": best, "one": 1000 / rates[1], "cpu": cpu[best]}


def client(
    url: str, connections: int, images: int, seconds: float, arrivals: float | None = None
) -> dict[str, float | int]:
    """Images/s and milliseconds of requests: one after the other on each connection, or at random times."""
    bodies = [form([photograph(seed * images + index) for index in range(images)]) for seed in range(4)]
    times: list[float] = []
    refused = 0

    async def one(session: httpx.AsyncClient, number: int, due: float) -> None:
        nonlocal refused
        answer = await session.post("/v1/embeddings", content=bodies[number % len(bodies)], headers=HEADERS)
        if answer.status_code == 200:
            times.append(time.perf_counter() - due)
        else:
            refused += 1

    async def closed(session: httpx.AsyncClient, until: float) -> None:
        number = 0
        while time.perf_counter() < until:
            await one(session, number, time.perf_counter())
            number += 1

    async def opened(session: httpx.AsyncClient, rate: float) -> None:
        gaps = np.random.default_rng(0).exponential(1 / rate, max(1, int(rate * seconds)))
        begin = time.perf_counter()
        asked = []
        for number, due in enumerate(begin + np.cumsum(gaps)):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asked.append(asyncio.create_task(one(session, number, due)))
        await asyncio.gather(*asked)

    async def run() -> float:
        pool = httpx.Limits(max_connections=None if arrivals else connections)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=pool) as session:
            start = time.perf_counter()
            if arrivals:
                await opened(session, arrivals)
            else:
                await asyncio.gather(*(closed(session, start + seconds) for _ in range(connections)))
            return time.perf_counter() - start

    took = asyncio.run(run())
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    answered = len(times) * images
    return {"rate": answered / took, "images": answered, "p50": p50, "p99": p99, "refused": refused}


def plain(folder: str, port: int) -> None:
    """What one would write in ten minutes: FastAPI's own form, a thread a request, one model behind a lock."""
    import threading

    import torch
    import uvicorn
    from fastapi import FastAPI, Response, UploadFile

    from serve.model import CheckpointEmbedder

    torch.set_num_threads(1)
    model = CheckpointEmbedder(Path(folder), "plain", "1")
    lock = threading.Lock()
    app = FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/embeddings")
    def embed(input: list[UploadFile]) -> Response:  # noqa: A002  # the API's own name
        inputs = [model.decode(file.file.read()) for file in input]
        with lock:
            rows = model.embed(inputs)
        return Response(rows.tobytes(), media_type="application/x-npy")

    uvicorn.run(app, port=port, log_level="warning")


@contextmanager
def server(folder: str, kind: str, replicas: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server in a process of its own, until it is ready."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # Whoever waits is to be served here: what is refused would not count.
    unlimited = ["--limits.wait-seconds", "1000", "--limits.seconds", "1000"]
    words = ["-m", "serve.app", "--model", folder, "--port", str(port), "--replicas", str(replicas), *unlimited]
    process = (
        subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
        if kind == "serve"
        else spawn("plain", folder=folder, port=port)
    )
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{url}/readyz", timeout=10).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None:
                raise SystemExit("the server ended")
            time.sleep(0.2)
        time.sleep(3 if replicas > 1 else 0)  # readyz is answered by whichever replica is
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def spawn(role: str, **given: Any) -> "subprocess.Popen[str]":
    """This script in another role."""
    words = ["-m", "benchmarks.serve_load", "--as", role, "--with", json.dumps(given)]
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def ask(role: str, **given: Any) -> dict[str, float]:
    """What this script says in another role."""
    said: dict[str, float] = json.loads(spawn(role, **given).communicate()[0].splitlines()[-1])
    return said


def form(files: Sequence[bytes]) -> bytes:
    """The files as multipart/form-data."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="input"; filename="x.jpg"\r\n\r\n'.encode()
    return b"".join(head + data + b"\r\n" for data in files) + f"--{BOUNDARY}--\r\n".encode()


def write(folder: Path, name: str) -> Path:
    """A checkpoint with random weights."""
    import torch

    from dml import checkpoint, encoders
    from dml.config import Config, DataConfig, EncoderConfig

    data = DataConfig(image_size=224, channels=3, augment="crop")
    config = Config(data=data, encoder=EncoderConfig(name=name, dim=128))
    torch.manual_seed(0)
    checkpoint.save(folder, encoders.build(config.encoder, channels=3, image_size=224), config, info={})
    return folder


if __name__ == "__main__":
    main()
