"""What threshold curves cost: `python -m benchmarks.threshold_curves`, with --sop for the memory at SOP's size.

Prints medians of interleaved repeats: the blocked N x N float32 product alone (all N^2 pairs, nothing kept), the curves
(each unordered pair once), and their ratio, on 1 and on all threads; then the growth with N, a plain NumPy
implementation that keeps every pair, and what the measured rate makes of a million samples on many ranks.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dml.metrics.threshold import ThresholdCurves, threshold_curves

SETS = ((7_000, 64, 500), (20_000, 256, 2_000))
GROWTH = ((10_000, 256, 1_000), (20_000, 256, 2_000), (40_000, 256, 4_000))
PLAIN = (4_000, 256, 400)
SOP = (60_502, 512, 11_316)
MILLION = (1_000_000, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--sop", action="store_true", help="also time and peak memory at SOP's size, and a million")
    parser.add_argument("--child", nargs=4, type=int, metavar=("N", "D", "C", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure_memory(*options.child)
        return
    threads = sorted(set(options.threads))
    beside_the_product(threads, options.repeats)
    growth(threads[-1], options.repeats)
    beside_plain_numpy(threads[-1], options.repeats)
    if options.sop:
        sop(threads[-1])


def beside_the_product(several_threads: list[int], repeats: int) -> None:
    print(f"{'threads':>7} {'N':>7} {'D':>4} {'C':>6} {'product s':>10} {'curves s':>9} {'ratio':>6}")
    for threads in several_threads:
        torch.set_num_threads(threads)
        for n, dim, classes in SETS:
            rows_ND, labels = embeddings(n, dim, classes)
            product, curves = interleaved(
                [partial(full_product, rows_ND), partial(threshold_curves, rows_ND, labels)], repeats
            )
            print(f"{threads:>7} {n:>7} {dim:>4} {classes:>6} {product:>10.3f} {curves:>9.3f} {curves / product:>6.2f}")


def growth(threads: int, repeats: int) -> None:
    torch.set_num_threads(threads)
    sets = [embeddings(*shape) for shape in GROWTH]
    times = interleaved([partial(threshold_curves, *data) for data in sets], repeats)
    print(f"\n{'threads':>7} {'N':>7} {'D':>4} {'curves s':>9} {'s / N^2, relative':>18}")
    for (n, dim, _), seconds in zip(GROWTH, times, strict=True):
        relative = seconds / n**2 * GROWTH[0][0] ** 2 / times[0]
        print(f"{threads:>7} {n:>7} {dim:>4} {seconds:>9.3f} {relative:>18.2f}")


def beside_plain_numpy(threads: int, repeats: int) -> None:
    torch.set_num_threads(threads)
    rows_ND, labels = embeddings(*PLAIN)
    ours = threshold_curves(rows_ND, labels)
    plain = plain_curves(rows_ND.numpy(), labels.numpy(), ours.thresholds_T)
    for mine, theirs in zip((ours.sensitivity_CT, ours.specificity_CT), plain, strict=True):
        # Another product rounds otherwise, which moves a pair in a million across a threshold.
        np.testing.assert_allclose(mine, theirs, atol=0.05)
        assert (mine != theirs).mean() < 0.01
    calls = [partial(plain_curves, rows_ND.numpy(), labels.numpy(), None), partial(threshold_curves, rows_ND, labels)]
    kept, streamed = interleaved(calls, min(repeats, 3))
    print(f"\nN = {PLAIN[0]:,}: plain NumPy with every pair kept {kept:.3f} s, curves {streamed:.3f} s, ", end="")
    print(f"{kept / streamed:.1f} times as fast")


def plain_curves(
    rows_ND: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], thresholds_T: np.ndarray[Any, Any] | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sensitivity and specificity as one would write them down; every pair is kept."""
    i, j = np.triu_indices(len(labels), k=1)
    distances = np.sqrt(np.maximum(2 - 2 * (rows_ND @ rows_ND.T)[i, j], 0))
    first, second = labels[i], labels[j]
    same = first == second
    if thresholds_T is None:
        thresholds_T = np.linspace(*np.quantile(distances[~same], (0.01, 0.10)), 101)
    sensitivity, specificity = [], []
    own, first, second, others = distances[same], first[~same], second[~same], distances[~same]
    owner, classes = labels[i][same], labels.max() + 1
    owners, ends = (np.bincount(x, minlength=classes) for x in (owner, np.concatenate([first, second])))
    for threshold in thresholds_T:
        near = others <= threshold
        accepted = np.bincount(first[near], minlength=classes) + np.bincount(second[near], minlength=classes)
        sensitivity.append(np.bincount(owner[own <= threshold], minlength=classes) / owners)
        specificity.append(1 - accepted / ends)
    return np.stack(sensitivity, 1), np.stack(specificity, 1)


def sop(threads: int) -> None:
    """Time and memory at SOP's test shape in a process of its own, and what that makes of a million samples."""
    child = [sys.executable, "-m", "benchmarks.threshold_curves", "--child", *map(str, (*SOP, threads))]
    seconds, mebibytes = map(float, subprocess.run(child, check=True, capture_output=True, text=True).stdout.split())
    n, dim, classes = SOP
    print(f"\nSOP: N = {n:,}, D = {dim}, C = {classes:,}, {threads} threads: {seconds:.1f} s, ", end="")
    print(f"peak memory beyond the embeddings {mebibytes:.0f} MiB")
    whole = seconds * (MILLION[0] / n) ** 2 * MILLION[1] / dim
    print(
        f"at this rate N = {MILLION[0]:,}, D = {MILLION[1]} takes {whole / 3600:.2f} h on one rank of {threads} ",
        end="",
    )
    print("threads, " + ", ".join(f"{whole / ranks / 60:.1f} min on {ranks}" for ranks in (8, 64)))


def measure_memory(n: int, dim: int, classes: int, threads: int) -> None:
    """Seconds, and how far the peak of this process rises above what it holds with the embeddings (MiB); Linux only."""
    torch.set_num_threads(threads)
    warm_up: ThresholdCurves = threshold_curves(*embeddings(2_000, dim, 200))
    assert len(warm_up.classes_C) == 200
    # Drawn in place, so that the peak of making them hides nothing.
    rows_ND = torch.empty(n, dim).normal_(generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % classes
    held, start = kibibytes("VmRSS"), time.perf_counter()
    threshold_curves(rows_ND, labels)
    print(time.perf_counter() - start, (kibibytes("VmHWM") - held) / 1024)


def kibibytes(name: str) -> int:
    # Not getrusage, whose peak a child takes over from the process that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


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
            torch.mm(rows, columns.T, out=out.view(-1)[: len(rows) * len(columns)].view(len(rows), len(columns)))


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
