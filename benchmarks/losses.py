"""What losses and TCM cost, forward and backward, at D = 512 and K = 4: `python -m benchmarks.losses`.

Prints medians of interleaved repeats, so that both sides of a ratio saw the same machine:

    tcm      beside the product s = e @ e.T; s.sum().backward(), and beside pytorch-metric-learning's
    memory   peak beyond the embeddings, of a process of its own
    added    each loss without parameters, with TCM and without
    step     a training step of a ResNet-18 at 64 px, with TCM and without
    zoo      each loss that pytorch-metric-learning has too, beside it

Embeddings are of any length, as an encoder gives them, and every loss normalises them.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.threshold_curves import interleaved
from dml import losses
from dml.config import LossConfig
from dml.losses import outside
from dml.losses.tcm import TCM
from dml.pairs import Pairs

D, K = 512, 4
PEERS = {
    "angular": "AngularLoss",
    "arcface": "ArcFaceLoss",
    "circle": "CircleLoss",
    "contrastive": "ContrastiveLoss",
    "cosface": "CosFaceLoss",
    "generalized_lifted": "GeneralizedLiftedStructureLoss",
    "histogram": "HistogramLoss",
    "margin": "MarginLoss",
    "multi_similarity": "MultiSimilarityLoss",
    "n_pair": "NPairsLoss",
    "normalized_softmax": "NormalizedSoftmaxLoss",
    "nt_xent": "NTXentLoss",
    "proxy_anchor": "ProxyAnchorLoss",
    "proxy_nca_pp": "ProxyNCALoss",
    "ranked_list": "RankedListLoss",
    "smooth_ap": "SmoothAPLoss",
    "snr_contrastive": "SignalToNoiseRatioContrastiveLoss",
    "soft_triple": "SoftTripleLoss",
    "supcon": "SupConLoss",
    "triplet": "TripletMarginLoss",
}
"""Our losses and the other's names of them. Some differ in miner or reduction; the docstrings say how."""
PEER_OPTIONS = {"RankedListLoss": {"margin": 0.4, "Tn": 10}, "SoftTripleLoss": {"centers_per_class": 2}}
SLOW = dict.fromkeys(
    ("TCM", "angular", "histogram", "margin", "nt_xent", "smooth_ap", "snr_contrastive", "triplet"), 384
)
"""The largest batch at which the other's is run: beyond, it takes minutes or more memory than there is."""

LossOf = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parts = {"tcm": tcm_alone, "memory": memory, "added": tcm_added, "step": training_step, "zoo": zoo}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="all unless named")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 384, 1024])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--slow-repeats", type=int, default=3, help="where a side takes seconds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gib", type=int, default=6, help="memory that this may take")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "B"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Some of the others' losses ask for tens of GB; this process then fails, and nothing else on the machine is killed.
    resource.setrlimit(resource.RLIMIT_DATA, (options.gib * 2**30, options.gib * 2**30))
    if options.peak:
        peak(options.peak[0], int(options.peak[1]))
        return
    for part in options.parts or parts:
        print(f"-- {part}, {options.threads} threads")
        parts[part](options)


def tcm_alone(options: argparse.Namespace) -> None:
    head = f"{'B':>5} {'product ms':>10} {'normalised':>10} {'TCM ms':>7} {'ratio':>6} {'ratio':>6}"
    print(f"{head} {'their ms':>9} {'times':>6}")
    for size in options.batches:
        names = ("product", "normalised product", "TCM")
        bare, normalised, ours = interleaved([call(ours_of(name, size), size) for name in names], options.repeats)
        line = f"{size:>5} {bare * 1e3:>10.2f} {normalised * 1e3:>10.2f} {ours * 1e3:>7.2f} "
        print(f"{line}{ours / bare:>6.2f} {ours / normalised:>6.2f} {against_peer('TCM', size, options)}", flush=True)


def against_peer(name: str, size: int, options: argparse.Namespace) -> str:
    """The other's time and how many times ours it is, from runs of both side by side."""
    if size > SLOW.get(name, size):
        return f"{'-':>9} {'-':>6}"
    sides = [call(ours_of(name, size), size), call(theirs_of(name, size), size)]
    try:
        ours, theirs = interleaved(sides, options.slow_repeats)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        return f"more than {options.gib} GiB"
    if theirs < 0.5:
        ours, theirs = interleaved(sides, options.repeats)
    return f"{theirs * 1e3:>9.2f} {theirs / ours:>6.1f}"


def memory(options: argparse.Namespace) -> None:
    print(f"{'B':>5} {'(B, B) MiB':>10} {'loss':>18} {'peak MiB':>9} {'in (B, B)':>9}")
    for size in (1024, 2048, 4096):
        matrix = 4 * size**2 / 2**20
        for name in ("product", "TCM", *(("smooth_ap", "recall_surrogate") if size == 1024 else ())):
            # A process of its own: the kernel keeps one peak for the life of a process.
            words = [sys.executable, "-m", "benchmarks.losses", "--threads", str(options.threads), "--peak"]
            found = float(subprocess.run([*words, name, str(size)], check=True, capture_output=True).stdout)
            print(f"{size:>5} {matrix:>10.0f} {name:>18} {found:>9.1f} {found / matrix:>9.1f}", flush=True)


def peak(name: str, size: int) -> None:
    """Prints the peak of resident memory in one call beyond what was resident before it, in MiB; Linux only."""
    small, large = call(ours_of(name, size), 64), call(ours_of(name, size), size)
    small()  # libraries loaded
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    before = kib("VmRSS")
    large()
    print((kib("VmHWM") - before) / 1024)


def kib(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1])


def tcm_added(options: argparse.Namespace) -> None:
    print(f"{'B':>5} {'loss':>18} {'alone ms':>8} {'with TCM':>8} {'ratio':>6}")
    for size in options.batches:
        for name in sorted(name for name, cls in losses.LOSSES.items() if "dim" not in cls.needs):
            sides = [call(ours_of(name, size), size), call(ours_of(name, size, tcm=True), size)]
            alone, both = interleaved(sides, options.repeats)
            print(f"{size:>5} {name:>18} {alone * 1e3:>8.2f} {both * 1e3:>8.2f} {both / alone:>6.2f}", flush=True)


def training_step(options: argparse.Namespace) -> None:
    """Pairs of steps, either first in turn, and the mean of their ratios with its 95% interval."""
    print(f"{'B':>5} {'alone ms':>8} {'with TCM':>8} {'ratio':>6}  95% interval")
    for size in [size for size in options.batches if size <= 128]:
        steps = [step(ours_of("multi_similarity", size, tcm=tcm), size) for tcm in (False, True)]
        times: list[list[float]] = [[], []]
        for repeat in range(options.repeats + 1):
            for side in (0, 1) if repeat % 2 else (1, 0):
                start = time.perf_counter()
                steps[side]()
                if repeat:  # the first round warms up
                    times[side].append(time.perf_counter() - start)
        ratios = [both / alone for alone, both in zip(*times, strict=True)]
        mean, half = statistics.mean(ratios), 1.96 * statistics.stdev(ratios) / len(ratios) ** 0.5
        alone, both = (statistics.median(seen) * 1e3 for seen in times)
        print(f"{size:>5} {alone:>8.0f} {both:>8.0f} {mean:>6.3f}  {mean - half:.3f} .. {mean + half:.3f}", flush=True)


def zoo(options: argparse.Namespace) -> None:
    print(f"{'B':>5} {'loss':>18} {'ours ms':>8} {'their ms':>9} {'times':>6}")
    for size in options.batches:
        for name in PEERS:
            (ours,) = interleaved([call(ours_of(name, size), size)], options.slow_repeats)
            print(f"{size:>5} {name:>18} {ours * 1e3:>8.2f} {against_peer(name, size, options)}", flush=True)


def ours_of(name: str, size: int, *, tcm: bool = False) -> LossOf:
    """A product, TCM or a loss of LOSSES, as a function of embeddings and labels."""
    if name == "product":
        return lambda rows_BD, _: product(rows_BD)
    if name == "normalised product":
        return lambda rows_BD, _: product(F.normalize(rows_BD, dim=1))
    regulariser = TCM()
    if name == "TCM":
        return lambda rows_BD, labels: regulariser(Pairs.of(rows_BD, labels, group=None))
    loss = losses.from_config(LossConfig(name=name), num_classes=size // K, dim=D)

    def value(rows_BD: Tensor, labels: Tensor) -> Tensor:
        pairs = Pairs.of(rows_BD, labels, group=None)
        return loss(pairs) + regulariser(pairs) if tcm else loss(pairs)

    return value


def product(rows_BD: Tensor) -> Tensor:
    return (rows_BD @ rows_BD.T).sum()


def theirs_of(name: str, size: int) -> LossOf:
    other = "ThresholdConsistentMarginLoss" if name == "TCM" else PEERS[name]
    path = f"pytorch_metric_learning.losses:{other}"
    loss = outside.load(path, PEER_OPTIONS.get(other, {}), num_classes=size // K, dim=D)
    return loss.module  # type: ignore[return-value]


def call(loss: LossOf, size: int) -> Callable[[], None]:
    """Forward and backward of a loss on a batch whose classes overlap."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) // K
    centres_CD = torch.randn(size // K, D, generator=generator)
    leaf_BD = (centres_CD[labels] + torch.randn(size, D, generator=generator)).requires_grad_()

    def once() -> None:
        leaf_BD.grad = None
        loss(leaf_BD, labels).backward()

    return once


def step(loss: LossOf, size: int) -> Callable[[], None]:
    """A training step of a ResNet-18 at 64 px."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=D).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(size, 3, 64, 64).to(memory_format=torch.channels_last)
    labels = torch.arange(size) // K

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model(images), labels).backward()
        optimizer.step()

    return once


if __name__ == "__main__":
    main()
