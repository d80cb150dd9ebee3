"""What a search in a gallery costs: `python -m benchmarks.gallery_search`.

--index: one query at a time, on one thread, over rows around class centres: faiss's flat search, our index, and HNSW,
with recall@10 against the flat search, and the time to build. --service: 100,000 x 128 behind Ray Serve: a
search by an image beside the embedding of the same image, in turns, and a search by an embedding. --large N: a gallery
of N items in a process of its own: time to fill, to open again and to make the index, memory, and time of a search.
Without options all of it, with a million items.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from serve.gallery.galleries import Galleries
from serve.gallery.index import Index
from serve.gallery.items import Item
from serve.gallery.lock import SharedLock

DIM = 128
QUERIES = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", action="store_true")
    parser.add_argument("--service", action="store_true")
    parser.add_argument("--large", type=int, metavar="N")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    everything = not (options.index or options.service or options.large or options.alone)
    print(f"load {os.getloadavg()[0]:.1f}")
    if options.alone:
        alone(options.alone)
    if options.index or everything:
        indices(options.sizes)
    if options.service or everything:
        service(100_000)
    if options.large or everything:
        command = [sys.executable, "-m", "benchmarks.gallery_search", "--alone", str(options.large or 1_000_000)]
        subprocess.run(command, check=True)


def rows_of(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Rows around a centre for every twenty, as the classes of a gallery lie; made in place."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, count // 20), DIM), dtype=np.float32)
    rows = rng.standard_normal((count, DIM), dtype=np.float32)
    for start in range(0, count, 10_000):
        part = rows[start : start + 10_000]
        part += 1.5 * centres[rng.integers(0, len(centres), len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def milliseconds(call: Callable[[Any], object], given: Any) -> list[float]:
    times = []
    for each in given:
        start = time.perf_counter()
        call(each)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def shown(times: list[float]) -> str:
    ordered = sorted(times)
    return f"{statistics.median(ordered):8.2f} {ordered[int(0.99 * len(ordered))]:8.2f}"


def queries_of(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows near stored ones: other images of the same things."""
    rng = np.random.default_rng(1)
    near = rows[rng.choice(len(rows), QUERIES)] + 0.05 * rng.standard_normal((QUERIES, DIM), dtype=np.float32)
    unit: npt.NDArray[np.float32] = near / np.linalg.norm(near, axis=1, keepdims=True)
    return unit


def indices(sizes: list[int]) -> None:
    import faiss

    faiss.omp_set_num_threads(1)
    print(f"{'items':>8} {'index':10} {'p50 ms':>8} {'p99 ms':>8} {'recall@10':>10} {'build s':>8}")
    for count in sizes:
        rows = rows_of(count)
        queries = queries_of(rows)
        _, truth = faiss.knn(queries, rows, 10, metric=faiss.METRIC_INNER_PRODUCT)
        flat = milliseconds(lambda q: faiss.knn(q[None], rows, 10, metric=faiss.METRIC_INNER_PRODUCT), queries)  # noqa: B023
        print(f"{count:>8} {'flat':10} {shown(flat)} {1:>10.3f}")
        for name, made in (("ours", ours), ("HNSW 32", hnsw)):
            start = time.perf_counter()
            search, label = made(rows)
            seconds = time.perf_counter() - start
            found = [search(query) for query in queries]
            recall = np.mean([len(set(t) & set(f)) / 10 for t, f in zip(truth.tolist(), found, strict=True)])
            times = milliseconds(search, queries)
            print(f"{count:>8} {label or name:10} {shown(times)} {recall:>10.3f} {seconds:>8.1f}")


def ours(rows: npt.NDArray[np.float32]) -> tuple[Callable[[Any], list[int]], str]:
    index = Index(DIM, SharedLock(), exact_up_to=1000)
    index.put(range(len(rows)), rows)
    index.build()
    report = index.report
    return lambda query: index.search(query, 10)[1].tolist(), f"{report.kind} {report.probes}/{report.lists}"


def hnsw(rows: npt.NDArray[np.float32]) -> tuple[Callable[[Any], list[int]], str]:
    import faiss

    index = faiss.IndexHNSWFlat(DIM, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 100, 64
    index.add(rows)
    return lambda query: index.search(query[None], 10)[1][0].tolist(), ""


def alone(count: int) -> None:
    rows = rows_of(count)
    queries = queries_of(rows)
    scratch = tempfile.TemporaryDirectory()
    asyncio.run(fill(Path(scratch.name), rows))
    del rows
    before = psutil.Process().memory_info().rss
    asyncio.run(opened(Path(scratch.name), queries, before))
    scratch.cleanup()


async def fill(folder: Path, rows: npt.NDArray[np.float32]) -> None:
    galleries = Galleries(folder)
    await galleries.create("large", None)
    start = time.perf_counter()
    for at in range(0, len(rows), 1000):
        items = [
            Item(f"shop/{n:09d}.jpg", rows[n], '{"label":"some class"}') for n in range(at, min(at + 1000, len(rows)))
        ]
        await galleries.add("large", "m@1", items)
    print(f"{len(rows):,} items: added by 1,000 in {time.perf_counter() - start:.1f} s, index built beside", end="; ")
    await galleries.close()


async def opened(folder: Path, queries: npt.NDArray[np.float32], before: int) -> None:
    start = time.perf_counter()
    galleries = Galleries(folder, exact_up_to=10**9)
    seconds = time.perf_counter() - start
    size = (await galleries.info("large")).bytes
    rss = psutil.Process().memory_info().rss - before
    print(f"{size / 2**20:.0f} MiB on the disk; opened in {seconds:.1f} s with {rss / 2**20:.0f} MiB")
    exact = [await timed(galleries, query) for query in queries[:50]]
    print(f"exact search p50 and p99, ms {shown(exact)}")
    await galleries.close()
    del galleries
    galleries = Galleries(folder, threads=os.cpu_count() or 1)
    start = time.perf_counter()
    during: list[float] = []
    while (await galleries.info("large")).index.kind == "flat":
        during.append(await timed(galleries, queries[len(during) % QUERIES]))
    report = (await galleries.info("large")).index
    print(f"index in {time.perf_counter() - start:.1f} s beside searches of {shown(during)} ms: {report}")
    rss = psutil.Process().memory_info().rss - before
    print(f"memory with it {rss / 2**20:.0f} MiB; search p50 and p99, ms", end=" ")
    print(shown([await timed(galleries, query) for query in queries]))
    await galleries.close()


async def timed(galleries: Galleries, query: npt.NDArray[np.float32]) -> float:
    start = time.perf_counter()
    await galleries.search("large", "m@1", query, 10)
    return 1e3 * (time.perf_counter() - start)


def service(count: int) -> None:
    import base64

    import httpx
    import ray
    import ray.serve
    import torch

    from cluster import session
    from dml import checkpoint, encoders
    from dml.config import Config, DataConfig, EncoderConfig
    from serve import app

    scratch = tempfile.TemporaryDirectory()
    folder, store = Path(scratch.name) / "tiny", Path(scratch.name) / "store"
    config = Config(data=DataConfig(image_size=32), encoder=EncoderConfig(dim=DIM))
    torch.manual_seed(0)
    checkpoint.save(folder, encoders.build(config.encoder, channels=1, image_size=32), config, info={})
    rows = rows_of(count)

    async def filled() -> None:
        galleries = Galleries(store)
        await galleries.create("shop", None)
        for at in range(0, count, 1000):
            items = [Item(f"{n:09d}", rows[n], '{"label":"some class"}') for n in range(at, at + 1000)]
            await galleries.add("shop", "onethreshold@tiny", items)
        await galleries.close()

    asyncio.run(filled())
    session.connect()
    url = app.start(app.Options(port=8765, model=str(folder), galleries=str(store)))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    image = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    with httpx.Client(base_url=url, timeout=60) as http:
        while http.get("/readyz").status_code != 200:
            time.sleep(0.2)

        def post(path: str, **body: Any) -> None:
            answer = http.post(path, json=body)
            assert answer.status_code == 200, answer.text

        calls: dict[str, Callable[[Any], None]] = {
            "embed an image": lambda _: post("/v1/embeddings", input=image, encoding_format="base64"),
            "search by an image": lambda _: post("/v1/search", gallery="shop", query=image, threshold=1),
            "search by an embedding": lambda q: post("/v1/search", gallery="shop", query=q, threshold=1),
        }
        queries = queries_of(rows).tolist()
        calls["search by an embedding"](queries[0])  # from then on the index is made
        while http.get("/v1/galleries/shop").json()["index"]["kind"] == "flat":
            time.sleep(0.2)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for query in [*queries[:20], *queries]:
            for name, call in calls.items():
                times[name] += milliseconds(call, [query])
    print(f"{count:,} x {DIM} over HTTP")
    print(f"{'':24} {'p50 ms':>8} {'p99 ms':>8}")
    for name, taken in times.items():
        print(f"{name:24} {shown(taken[20:])}")
    beyond = statistics.median(times["search by an image"][20:]) - statistics.median(times["embed an image"][20:])
    print(f"{'search beyond embedding':24} {beyond:8.2f}")
    ray.serve.shutdown()
    ray.shutdown()
    scratch.cleanup()


if __name__ == "__main__":
    main()
