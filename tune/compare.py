"""Trains with and without TCM over paired seeds and compares them on test classes: `python -m tune.compare --seeds 3`.

One search picks the best of many trials, and OPIS is noisy from seed to seed: this says what the picked margins buy.
Both sides of a pair start from the same weights and see the same batches.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import ray
import rich.box
import rich.console
import rich.table
import tyro

from cluster import command_line, session
from cluster.tracking import Store
from cluster.worker import Job, tracked, work
from dml.config import Config
from tune import report, tested

SHOWN = (
    ("Recall@1", "recall@1", 4),
    ("OPIS", "opis", 5),
    ("noise floor", "opis_noise_floor", 5),
    ("mean utility", "mean_utility", 4),
)


@dataclass(frozen=True)
class Options:
    """Compares the TCM of these settings with no TCM, on test classes, over paired seeds.

    Give what a search on val classes found, e.g. --tcm.weight 0.1 --tcm.margin-pos 0.8 --tcm.margin-neg 0.4. The test
    classes say how good it is; they are not for choosing.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    seeds: int = 3
    """Pairs to train, with train.seed, train.seed + 1, ..."""
    cpus_per_worker: float | None = None
    """CPUs of each training; 1 unless given."""
    gpus_per_worker: float | None = None
    """GPUs of each training, may be a fraction; 1 when the cluster has GPUs, else 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = command_line.parse(Options, sys.argv[1:] if argv is None else argv)
    config = options.config
    with command_line.one_line_errors(status=2):
        if config.tcm.weight == 0:
            raise ValueError("tcm.weight: 0 is the baseline itself; give the weight to compare with it, e.g. 0.1")
        if options.seeds < 1:
            raise ValueError(f"seeds: {options.seeds} is too few; at least 1")
    splits = command_line.preflight(config)
    session.connect()
    with command_line.one_line_errors():
        resources = session.Resources.of(1, options.cpus_per_worker, options.gpus_per_worker)
        command_line.print_config(config)
        store = Store.open()
        name = command_line.stamped(f"compare-{config.data.dataset}")
        parent = store.start(name, params=config.flat, tags={"kind": "compare"}, key=name)
        with parent.closing():
            pairs = _train_pairs(config, options.seeds, resources, store, parent.run_id, name)
    _print(pairs, len(splits.test.classes))
    return 0


def _train_pairs(
    config: Config, seeds: int, resources: session.Resources, store: Store, parent: str, name: str
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Test figures without and with TCM for each seed; the trainings run side by side as far as the cluster goes."""
    task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)(_train)
    started = []
    for seed in range(config.train.seed, config.train.seed + seeds):
        for side, weight in (("baseline", 0.0), ("TCM", config.tcm.weight)):
            changed = config.replace(**{"train.seed": seed, "tcm.weight": weight})
            label = f"{side}, seed {seed}"
            started.append(task.remote(Job(changed, label, store, parent, f"{name}/{label}", {"kind": "compare"})))
    for done in range(1, len(started) + 1):
        ray.wait(started, num_returns=done)
        print(f"[{done}/{len(started)}] trained", flush=True)
    figures = ray.get(started)
    return list(zip(figures[::2], figures[1::2], strict=True))


def _train(job: Job) -> dict[str, float]:
    device = session.use_device()
    with tempfile.TemporaryDirectory() as scratch:
        best = Path(scratch) / "best"

        def keep(metrics: dict[str, float | str], folder: Path | None) -> None:
            if folder is not None:
                shutil.rmtree(best, ignore_errors=True)
                shutil.copytree(folder, best)

        with tracked(job) as job:
            work(job, keep, device=device)
        return tested.test_model(best, device).metrics


def _print(pairs: list[tuple[dict[str, float], dict[str, float]]], classes: int) -> None:
    table = rich.table.Table(
        title=f"{classes} test classes, {len(pairs)} paired seeds", title_justify="left", box=rich.box.SIMPLE_HEAD
    )
    table.add_column("")
    for name, _, _ in SHOWN:
        table.add_column(name, justify="right")
    sides = [("without TCM", [before for before, _ in pairs]), ("with TCM", [after for _, after in pairs])]
    for label, rows in sides:
        for index, row in enumerate(rows):
            table.add_row(f"{label}, seed {index}", *(f"{row[f'test/{key}']:.{digits}f}" for _, key, digits in SHOWN))
    for label, rows in sides:
        table.add_row(f"{label}, mean", *(_spread([row[f"test/{key}"] for row in rows], d) for _, key, d in SHOWN))
    recall = [100 * (after["test/recall@1"] - before["test/recall@1"]) for before, after in pairs]
    before, after = (mean(row["test/opis"] for row in rows) for _, rows in sides)
    rich.console.Console(width=110).print(table)
    print(f"TCM changes mean OPIS by {report.relative(before, after)} and Recall@1 by {_spread(recall, 2)} points")


def _spread(values: list[float], digits: int) -> str:
    """Mean, with the standard deviation over seeds when there are several."""
    deviation = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    raise SystemExit(main())
