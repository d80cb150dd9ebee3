"""What a search costs beside its training: `python -m benchmarks.search_overhead`.

a trial        seconds of a trial outside its training loop, beside a naive trainer: a TorchTrainer a trial, as Ray's
               documentation nests them. The same digits, steps and reports, on one worker and on two
many trials    a stub that sleeps 50 ms: seconds a trial beyond the sleep, what of them is Optuna's, and the memory
               of the driver as trials go by
efficiency     --efficiency only, since it trains for hours: the best score against the number of trials, by sampler
               and over seeds, as a table and a plot
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psutil
import ray
import ray.train
import ray.tune
import torch
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler

from cluster import session
from dml import loop, recipes
from dml.data import datasets
from tune import sampler, search, storage
from tune.objective import Objective
from tune.optuna_search import StudySearch
from tune.progress import Progress
from tune.space import Space
from tune.trials import Bench

SETTINGS = {"train.epochs": 2, "train.steps_per_epoch": 10}
WORDS = ["--recipe", "digits", *(word for name, value in SETTINGS.items() for word in (f"--{name}", str(value)))]
SLEEP = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--trials", type=int, default=6, help="of a trial's overhead")
    parser.add_argument("--stubs", type=int, default=1000, help="trials of the stub; 0 leaves it out")
    parser.add_argument("--sampler", default="tpe", help="of the stub's trials")
    parser.add_argument("--efficiency", type=Path, help="where the plot goes, e.g. efficiency.png")
    parser.add_argument("--samplers", nargs="+", default=["tpe", "gp", "random"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", nargs=argparse.REMAINDER, default=[], help="last: options of the searches")
    options = parser.parse_args()
    if options.efficiency is not None:
        efficiency(options.efficiency, options.samplers, options.seeds, options.search)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        session.connect()
        for workers in options.workers:
            a_trial(workers, options.trials)
        if options.stubs:
            many_trials(options.stubs, options.sampler)
        ray.shutdown()
        os.chdir("/")


def a_trial(workers: int, trials: int) -> None:
    """Both one after the other, on the same cluster."""
    with quiet():
        search.main([*WORDS, "--trials", str(trials), "--workers-per-trial", str(workers), "--name", f"by-{workers}"])
    assert Progress.latest is not None
    ours = Progress.latest.overhead
    naive = naive_trials(workers, max(2, trials // 2))
    print(f"\n-- a trial over {workers} worker{'s' * (workers > 1)}: seconds outside the training loop, median (most)")
    for name, seconds in (
        ("tune.search, first of a process", ours.first),
        ("tune.search, later ones", ours.later),
        ("naive, a TorchTrainer a trial", naive),
    ):
        if seconds:
            told = f"{statistics.median(seconds):>8.2f} ({max(seconds):.2f})"
            print(f"{name:<34} {told}   of {len(seconds)}")


class _Walls(ray.tune.Callback):
    """Seconds of each trial, from its start to its end."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.began[trial.trial_id] = time.perf_counter()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.seconds[trial.trial_id] = time.perf_counter() - self.began[trial.trial_id]


def naive_trials(workers: int, trials: int) -> list[float]:
    """As many at once as tune.search would run: as many as there is room for."""
    walls = _Walls()
    # A driver that holds a share of a CPU would starve its own workers where there are as many CPUs as workers.
    drivers = {"CPU": 0.01} if workers == 1 else {"memory": 1.0}
    config = recipes.digits("short").replace(**SETTINGS)

    def train(params: dict[str, Any]) -> None:
        trainer = TorchTrainer(
            naive_loop,
            train_loop_config={"config": config},
            scaling_config=ray.train.ScalingConfig(num_workers=workers),
            run_config=ray.train.RunConfig(
                name=f"naive-{params['number']}",
                storage_path=params["storage"],
                callbacks=cast(Any, [TuneReportCallback()]),  # typed as the callbacks of Ray's first Train API
            ),
        )
        trainer.fit()

    tuner = ray.tune.Tuner(
        ray.tune.with_resources(train, drivers),
        param_space={"number": ray.tune.grid_search([*range(trials)]), "storage": f"{Path.cwd()}/naive-{workers}"},
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=max(1, int(ray.cluster_resources()["CPU"]) // workers)),
        run_config=ray.tune.RunConfig(storage_path=str(Path.cwd() / "naive"), verbose=0, callbacks=[walls]),
    )
    with quiet():
        results = tuner.fit()
    reports = [results[index].metrics or {} for index in range(len(results))]
    inside = {report["trial_id"]: report["loop_seconds"] for report in reports}
    return [walls.seconds[trial] - seconds for trial, seconds in inside.items()]


def naive_loop(settings: dict[str, Any]) -> None:
    config, seconds = settings["config"], 0.0
    splits = datasets.load(config.data)
    began = time.perf_counter()
    for event in loop.train(config, splits, device=torch.device("cpu")):
        if isinstance(event, loop.EpochReport):
            seconds += time.perf_counter() - began
            ray.train.report({**event.metrics, "loop_seconds": seconds})
            began = time.perf_counter()


class _Timed(StudySearch):
    """Adds up what Optuna takes, and notes the driver's memory."""

    optuna_seconds = 0.0

    def suggest(self, trial_id: str) -> Any:
        began = time.perf_counter()
        try:
            return super().suggest(trial_id)
        finally:
            self.optuna_seconds += time.perf_counter() - began

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        began = time.perf_counter()
        super().on_trial_result(trial_id, result)
        self.optuna_seconds += time.perf_counter() - began

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        began = time.perf_counter()
        super().on_trial_complete(trial_id, result, error)
        self.optuna_seconds += time.perf_counter() - began


class _Memory(ray.tune.Callback):
    """The driver's resident memory, and the time, after each trial."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.after: list[tuple[float, float]] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.after.append((psutil.Process().memory_info().rss / 2**20, time.perf_counter() - self.began))


def stub(params: dict[str, Any]) -> None:
    time.sleep(SLEEP)
    margin = float(params.get("tcm.margin_pos", 0.5))
    recall, opis = 0.9, 0.01 * (1 + (margin - 0.7) ** 2)
    figures = {"epoch": 1, "best/recall@1": recall, "best/opis": opis, "best/score": recall - opis**0.5}
    ray.tune.report({**figures, "ended": True})


def many_trials(trials: int, name: sampler.SamplerName) -> None:
    at_once, memory = int(ray.cluster_resources()["CPU"]), _Memory()
    space = Space.of([], recipes.digits("short"), flat=name in sampler.FLAT)
    searcher = _Timed(
        space,
        Objective(),
        sampler=sampler.build(name, seed=0, trials=trials),
        points=space.first_points(),
        trials=trials,
        design=False,
        study="stub",
        url=storage.url(f"sqlite:///{Path.cwd()}/stub.db"),
    )
    bench = Bench(f"{Path.cwd()}/stub", stub, {"CPU": 1}, at_once, callbacks=[memory])
    outcomes = bench.search(searcher, FIFOScheduler())
    assert [outcome.state for outcome in outcomes] == ["finished"] * trials
    # The first trials of each process wait for its start.
    begun = 2 * at_once
    wall = memory.after[-1][1] - memory.after[begun - 1][1]
    each = wall / (trials - begun)
    print(f"\n-- {trials} trials of {1000 * SLEEP:.0f} ms by {name}, {at_once} at once, SQLite")
    print(f"{'seconds from one end to the next':<40} {each:>8.3f}")
    print(f"{'seconds a trial beyond its own':<40} {each * at_once - SLEEP:>8.3f}")
    print(f"{'of a trial in Optuna, in the driver':<40} {searcher.optuna_seconds / trials:>8.3f}")
    marks = [mark for mark in (20, 50, 100, 200, 500, 1000, 2000) if mark <= trials]
    for mark in marks:
        recent = memory.after[mark - 1][1] - memory.after[mark // 2 - 1][1]
        print(
            f"after {mark:>5} trials: driver {memory.after[mark - 1][0]:>7.1f} MiB; "
            f"{recent / (mark - mark // 2):.3f} s from one end to the next in their second half"
        )


def efficiency(plot: Path, samplers: Sequence[str], seeds: int, words: Sequence[str]) -> None:
    """Searches side by side with each other's numbers of trials, each in a folder of its own."""
    import optuna
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    print(f"best score after 1/4, 1/2, 3/4 and all of the trials, mean over {seeds} seeds (least to most)")
    for name in samplers:
        curves = []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "tune.search", "--sampler", name, "--seed", str(seed), "--name", "one"]
                subprocess.run([*command, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
                study = optuna.load_study(study_name="one", storage=f"sqlite:///{folder}/runs/optuna.db")
            scores = [trial.user_attrs.get("score", float("-inf")) for trial in study.trials]
            curves.append([max(scores[: number + 1]) for number in range(len(scores))])
        means, least, most = ([each(row) for row in zip(*curves, strict=True)] for each in (statistics.mean, min, max))
        numbers = range(1, len(means) + 1)
        (line,) = axes.plot(numbers, means, label=name)
        axes.fill_between(numbers, least, most, color=line.get_color(), alpha=0.15, linewidth=0)
        at = [max(0, len(means) * quarter // 4 - 1) for quarter in (1, 2, 3, 4)]
        print(f"{name:<8}" + "".join(f"  {means[n]:.4f} ({least[n]:.4f} to {most[n]:.4f})" for n in at), flush=True)
    axes.set_xlabel("trials")
    axes.set_ylabel("best Recall@1 - w * sqrt(OPIS) on val so far")
    axes.legend(title=f"mean and range of {seeds} seeds")
    figure.savefig(plot, dpi=130)
    print(plot)


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves out what the searches say."""
    with Path(os.devnull).open("w") as nowhere:
        shown, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = shown


if __name__ == "__main__":
    main()
