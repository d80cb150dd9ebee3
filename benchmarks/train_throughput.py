"""`python -m cluster.train` beside plain DDP by torchrun, on 1 and 2 ranks: `python -m benchmarks.train_throughput`.

Both train a ResNet-18 at 64 px on the same digits in memory with the same loss, batch, optimiser and precision, a
thread a rank, in turns, so that a pair of runs saw the same machine. The loss notes when it is called, in both.

    steady state   images/s from the median time between two calls, the first few and the evaluation left out; the
                   paired ratio ours / plain with its 95 % interval (t, of logarithms); the same of CPU time
    first step     from the command to the first call of the loss, and what that is made of; ours also without the start
                   of Ray, which is timed by itself, as often
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats

from benchmarks._plain_ddp import STAMPS
from dml import recipes
from dml.data import datasets

SIZE, CLASSES, SAMPLES, SKIPPED = 64, 6, 10, 5
SETTINGS = {
    "data.image-size": SIZE,
    "data.augment": "none",
    "encoder.name": "resnet18",
    "batch.classes": CLASSES,
    "batch.samples": SAMPLES,
    "train.epochs": 1,
    "loss.name": "benchmarks._plain_ddp:MultiSimilarity",
}
RAY_INIT = (
    "import time; began = time.time(); from cluster import session; imported = time.time(); session.connect(); "
    "print(time.time() - imported)"
)
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Timed:
    """One run, in seconds since the command."""

    made: list[float]
    """When the loss was made, in the order of processes: ours makes one to check its name before there are workers."""
    called: list[float]
    """When rank 0 called it."""
    cpu: list[float]
    """Seconds of CPU that its process had taken by then."""

    @property
    def step(self) -> float:
        """Seconds of a step, once under way."""
        return float(np.median(np.diff(self.called[SKIPPED:])))

    @property
    def step_cpu(self) -> float:
        """Seconds of CPU of a step, in which other work on the machine shows less."""
        return float(np.median(np.diff(self.cpu[SKIPPED:])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_digits(place / "digits.npz")
        # The store of the first run ever is made here: tables of a database, once in the life of an installation.
        run([sys.executable, "-c", "from cluster.tracking import Store; Store.open()"], place)
        for workers in options.workers:
            compare(workers, options.pairs, options.steps, place)


def write_digits(path: Path) -> None:
    """The training split that `--recipe digits` has, as plain arrays."""
    config = recipes.digits().replace(**{"data.image_size": SIZE, "data.augment": "none"})
    train = datasets.load(config.data).train
    np.savez(path, pixels=np.asarray(train.images(range(len(train)))), labels=train.labels_N)


def compare(workers: int, pairs: int, steps: int, place: Path) -> None:
    ours: list[Timed] = []
    plain: list[Timed] = []
    starts: list[float] = []
    for pair in range(pairs):
        # Whoever is first in a pair meets another machine, if its load drifts.
        for side in (ours, plain) if pair % 2 else (plain, ours):
            command = train_command(workers, steps, place) if side is ours else torchrun_command(workers, steps, place)
            side.append(timed(command, place, steps))
        starts.append(float(run([sys.executable, "-c", RAY_INIT], place)))
    print(f"\n-- {workers} rank{'s' * (workers > 1)}, {pairs} pairs of {steps} steps of {CLASSES * SAMPLES} images")
    for name, runs in (("cluster.train", ours), ("torchrun", plain)):
        rate = CLASSES * SAMPLES / statistics.median(each.step for each in runs)
        print(f"{name:<20} {rate:>8.1f} images/s")
    print(ratio_line("steady state, ours / plain", [1 / each.step for each in ours], [1 / each.step for each in plain]))
    print(
        ratio_line(
            "CPU of rank 0 a step, plain / ours", [each.step_cpu for each in plain], [each.step_cpu for each in ours]
        )
    )
    split(ours, plain, starts)


def split(ours: Sequence[Timed], plain: Sequence[Timed], starts: Sequence[float]) -> None:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    print(f"{'to the first step, s':<20} {'ours':>8} {'torchrun':>8}")
    checked = median([each.made[0] for each in ours])
    start = median(starts)
    built = median([each.made[1] - each.made[0] for each in ours])
    rows: list[tuple[str, float, float | None]] = [
        ("imports and check", checked, None),
        ("start of Ray", start, None),
        ("workers, data, model", built - start, median([each.made[0] for each in plain])),
        ("first forward pass", *(median([each.called[0] - each.made[-1] for each in side]) for side in (ours, plain))),
        ("all", *(median([each.called[0] for each in side]) for side in (ours, plain))),
    ]
    for name, left, right in rows:
        print(f"{name:<20} {left:>8.1f}" + (f" {right:>8.1f}" if right is not None else ""))
    without = [each.called[0] - start for each, start in zip(ours, starts, strict=True)]
    print(ratio_line("first step, ours without Ray's start / plain", without, [each.called[0] for each in plain]))


def ratio_line(name: str, ours: Sequence[float], others: Sequence[float]) -> str:
    """The geometric mean of paired ratios, with its 95 % interval by Student's t on their logarithms."""
    logs = np.log(np.asarray(ours) / np.asarray(others))
    half = scipy.stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else 0
    low, middle, high = np.exp([logs.mean() - half, logs.mean(), logs.mean() + half])
    return f"{name:<46} {middle:.3f}  (95 % {low:.3f} to {high:.3f})"


def train_command(workers: int, steps: int, place: Path) -> list[str]:
    settings = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    own = ["--recipe", "digits", "--workers", str(workers), "--train.steps-per-epoch", str(steps)]
    own += ["--storage", str(place / "storage")]
    return [sys.executable, "-m", "cluster.train", *own, *settings]


def torchrun_command(workers: int, steps: int, place: Path) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(workers)]
    data = ["--data", str(place / "digits.npz"), "--classes", str(CLASSES), "--samples", str(SAMPLES)]
    return [*launcher, "-m", "benchmarks._plain_ddp", *data, "--steps", str(steps)]


def timed(command: Sequence[str], place: Path, steps: int) -> Timed:
    stamps = place / "stamps.0"
    stamps.unlink(missing_ok=True)
    began = time.time()
    run(command, place)
    lines = [line.split() for line in stamps.read_text().splitlines()]
    made, called = ([float(at) - began for kind, at, _ in lines if kind == event] for event in ("made", "called"))
    assert len(called) == steps, f"the loss was called {len(called)} times in {steps} steps"
    return Timed(made, called, [float(cpu) for kind, _, cpu in lines if kind == "called"])


def run(command: Sequence[str], folder: Path) -> str:
    """What a command printed, run in this folder, a thread a process as torchrun has it."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, STAMPS: str(folder / "stamps"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
