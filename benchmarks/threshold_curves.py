"""What threshold curves cost beside the bare matrix product: `python -m benchmarks.threshold_curves`.

Prints medians of interleaved repeats: the blocked N x N float32 product alone (all N^2 pairs, nothing kept), the curves
(each unordered pair once), and their ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from dml.metrics.threshold import threshold_curves

SETS = ((7_000, 64, 500), (20_000, 256, 2_000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    options = parser.parse_args()
    print(f"{'threads':>7} {'N':>7} {'D':>4} {'C':>6} {'product s':>10} {'curves s':>9} {'ratio':>6}")
    for threads in sorted(set(options.threads)):
        torch.set_num_threads(threads)
        for n, dim, classes in SETS:
            rows_ND, labels = embeddings(n, dim, classes)
            product, curves = interleaved(
                [partial(full_product, rows_ND), partial(threshold_curves, rows_ND, labels)], options.repeats
            )
            print(f"{threads:>7} {n:>7} {dim:>4} {classes:>6} {product:>10.3f} {curves:>9.3f} {curves / product:>6.2f}")


def embeddings(n: int, dim: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres_CD = torch.randn(classes, dim, generator=generator)
    rows_ND = centres_CD[labels] + 0.8 * torch.randn(n, dim, generator=generator)
    return torch.nn.functional.normalize(rows_ND, dim=1), labels


def full_product(rows_ND: torch.Tensor, tile: int = 1024) -> None:
    out = torch.empty(tile, tile)
    for rows in rows_ND.split(tile):
        for columns in rows_ND.split(tile):
            torch.mm(rows, columns.T, out=out[: len(rows)] if len(columns) == tile else None)


def interleaved(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, seen in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                seen.append(time.perf_counter() - start)
    return [statistics.median(seen) for seen in times]


if __name__ == "__main__":
    main()
