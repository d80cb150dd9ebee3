"""What retrieval costs beside pytorch-metric-learning's AccuracyCalculator: `python -m benchmarks.retrieval`.

Both compute Precision@1, R-precision and mAP@R of the same arrays, by the same exact search and with as many threads;
repeats are interleaved, medians are printed, and the figures must agree. `--sop` prints the peak memory beyond the
embeddings at the shape of SOP's test set and of one huge class, and `--growth` the times at N, 2N and 4N.
"""

import argparse
import resource
import subprocess
import sys
import time
from functools import partial

import psutil
import torch

from benchmarks.threshold_curves import interleaved
from dml.metrics.retrieval import recall_at_k, retrieval

SETS = ((5_000, 128, 100), (20_000, 256, 2_000))
SOP = (60_502, 512, 11_316)
NAMES = {"precision@1": "precision_at_1", "r_precision": "r_precision", "map@r": "mean_average_precision_at_r"}
"""Our measures and the other's names of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sop", action="store_true", help="peak memory at SOP's shape")
    parser.add_argument("--growth", action="store_true", help="times at N, 2N and 4N")
    parser.add_argument("--peak", type=int, nargs=3, metavar=("N", "D", "C"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        peak(*options.peak)
    elif options.sop:
        memory(options.threads)
    elif options.growth:
        growth()
    else:
        against_accuracy_calculator(options.repeats)


def against_accuracy_calculator(repeats: int) -> None:
    print(f"{'threads':>7} {'N':>7} {'D':>4} {'C':>6} {'ours s':>8} {'theirs s':>9} {'ratio':>6} {'map@r':>6} apart")
    for n, dim, classes in SETS:
        rows_ND, labels = confusable(n, dim, classes)
        ours = partial(retrieval, rows_ND, labels, ks=(1,), map_at=None)
        theirs = accuracy_calculator(rows_ND, labels)
        mine, other = ours().means(), theirs()
        apart = max(abs(mine[name] - other[their_name]) for name, their_name in NAMES.items())
        assert apart < 1e-6, f"{mine} and {other}"
        fast, slow = interleaved([ours, theirs], repeats)
        print(
            f"{torch.get_num_threads():>7} {n:>7} {dim:>4} {classes:>6} {fast:>8.3f} {slow:>9.3f} {fast / slow:>6.2f} "
            f"{mine['map@r']:>6.3f} {apart:>8.1e}"
        )


def confusable(n: int, dim: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings whose classes overlap, so that no measure is 1; made in place, so that they are all that is held."""
    generator = torch.Generator().manual_seed(0)
    labels, rows_ND = torch.arange(n) % classes, torch.empty(n, dim).normal_(generator=generator)
    centres_CD = torch.randn(classes, dim, generator=generator)
    for ids in torch.arange(n).split(1024):
        rows_ND[ids] = torch.nn.functional.normalize(centres_CD[labels[ids]] + 2 * rows_ND[ids], dim=1)
    return rows_ND, labels


def accuracy_calculator(rows_ND: torch.Tensor, labels: torch.Tensor) -> partial[dict[str, float]]:
    """The other's call, on the CPU, by inner product, with faiss on as many threads as torch."""
    import faiss
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import FaissKNN

    faiss.omp_set_num_threads(torch.get_num_threads())
    calculator = AccuracyCalculator(
        include=tuple(NAMES.values()),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=FaissKNN(index_init_fn=faiss.IndexFlatIP),
    )
    return partial(calculator.get_accuracy, rows_ND, labels)


def growth() -> None:
    print(f"{'N':>7} {'D':>4} {'C':>6} {'recall_at_k s':>14} {'to map@r s':>11} {'to map@1000 s':>14}")
    for n in (7_500, 15_000, 30_000):
        rows_ND, labels = confusable(n, 256, n // 10)
        seconds = [
            clock(partial(recall_at_k, rows_ND, labels)),
            clock(partial(retrieval, rows_ND, labels, map_at=None)),
            clock(partial(retrieval, rows_ND, labels)),
        ]
        print(f"{n:>7} {256:>4} {n // 10:>6} {seconds[0]:>14.2f} {seconds[1]:>11.2f} {seconds[2]:>14.2f}")


def memory(threads: int) -> None:
    print(f"{'N':>7} {'D':>4} {'C':>6} {'seconds':>8} {'MiB beyond the embeddings':>26}")
    for n, dim, classes in (SOP, (20_000, 256, 2)):
        shape = [str(n), str(dim), str(classes)]
        # A process of its own: the kernel keeps one peak for the life of a process.
        command = [sys.executable, "-m", "benchmarks.retrieval", "--threads", str(threads), "--peak", *shape]
        subprocess.run(command, check=True)


def peak(n: int, dim: int, classes: int) -> None:
    """Prints time and peak memory of everything that `retrieval` measures; of two classes, one is all but two."""
    few, few_labels = confusable(3000, dim, 100)
    retrieval(few, few_labels)  # libraries are loaded and their threads started
    rows_ND, labels = confusable(n, dim, classes)
    if classes == 2:
        labels = (torch.arange(n) < 2).long()
    before = psutil.Process().memory_info().rss
    seconds = clock(partial(retrieval, rows_ND, labels))
    beyond = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / 2**20
    print(f"{n:>7} {dim:>4} {classes:>6} {seconds:>8.1f} {beyond:>26.0f}")


def clock(call: partial[object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
