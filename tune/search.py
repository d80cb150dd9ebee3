"""Searches TCM's margins with Ray Tune and Optuna: `python -m tune.search`.

Every trial trains one encoder; trial 0 is the baseline without TCM. The winner becomes `onethreshold@champion`.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NoReturn

import ray
import ray.tune
import tyro

from cluster import command_line, session
from cluster.tracking import Store, runs_dir
from cluster.writer import Writer
from dml import plots
from dml.config import Config
from tune import promote, report, space
from tune.objective import Objective, Outcome, baseline, winner
from tune.progress import Progress, last_line
from tune.trial import Study, run


@dataclass(frozen=True)
class Options:
    """Searches TCM's margins, weight and start for the encoder whose single threshold holds best.

    Trial 0 is the baseline without TCM. The winner is the best score among trials whose Recall@1 is at least the
    baseline's minus the tolerance; it is registered in MLflow as onethreshold@champion.
    Every setting of the recipe can be changed by its name, e.g. --loss.name proxy_anchor --optim.lr 3e-4.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    objective: Objective = field(default_factory=Objective)
    trials: int = 8
    """Trials to run, the baseline included."""
    workers_per_trial: int = 1
    """Ranks that train each trial together by DDP."""
    cpus_per_worker: float | None = None
    """CPUs of each rank; 1 unless given."""
    gpus_per_worker: float | None = None
    """GPUs of each rank, may be a fraction; 1 when the cluster has GPUs, else 0."""
    name: str = ""
    """Names the search; a time stamp is added when unset."""
    resume: bool = False
    """Go on with the search of this name, or with the newest one, after an interruption."""
    storage: str = ""
    """Where checkpoints and the search's state go: a path that every node sees, or a URI. Default: runs/ray."""
    seed: int = 0
    """Seed of Optuna's sampler."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    began = time.perf_counter()
    words = list(sys.argv[1:] if argv is None else argv)
    options = command_line.parse(Options, words, budget="short")
    config = options.config.replace(**{"evaluate.score_weight": options.objective.weight, "tcm.weight": 0.0})
    storage = session.local_path(options.storage or session.storage())
    with command_line.one_line_errors(status=2):
        if options.trials < 1:
            raise ValueError(f"trials: {options.trials} is too few; at least 1")
        name = _name(options, storage)
    splits = command_line.preflight(config)
    session.connect()
    with command_line.one_line_errors():
        resources = session.Resources.of(options.workers_per_trial, options.cpus_per_worker, options.gpus_per_worker)
        store = Store.open(options.storage)
        parent = store.start(name, params=_params(options, config), tags={"kind": "search"}, key=name)
        command_line.print_config(config)
        print(f"search {name}: {options.trials} trials{_budget(words)}\n")
        study = Study(name, config, resources, storage, store, parent.run_id)
        with parent.closing() as record:
            outcomes = _search(options, study)
            if len(outcomes) < options.trials or any(outcome.state == "unfinished" for outcome in outcomes):
                _stop(outcomes, options, study, words)
            chosen = winner(outcomes, options.objective.tolerance)
            _finish(outcomes, chosen, study, record, toy=splits.toy)
    print(f"total {time.perf_counter() - began:.0f} s; {_overhead()}")
    print(f"browse it:  make ui      (mlflow ui --backend-store-uri {store.uri})")
    print("serve it:   make serve   (python -m serve.app)")
    return 0


def _search(options: Options, study: Study) -> list[Outcome]:
    """Runs or resumes the trials."""
    # Tune's own loggers would write every result three more times, and its display stand between the lines of ours.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    resources = study.resources
    trainable: Any = ray.tune.with_parameters(run, study=study)
    # More than one worker is a Ray Train job, which asks for its own CPUs: a driver that held a share of one could
    # starve its workers, and Tune refuses an empty request, so the driver asks for a byte.
    request = resources.per_worker if resources.workers == 1 else {"memory": 1.0}
    trainable = ray.tune.with_resources(trainable, request)
    if options.resume:
        tuner = ray.tune.Tuner.restore(f"{study.storage}/{study.name}", trainable, resume_unfinished=True)
    else:
        tuner = ray.tune.Tuner(
            trainable,
            tune_config=ray.tune.TuneConfig(
                search_alg=_optuna(options, study.name),
                metric="best/score",
                mode="max",
                num_samples=options.trials,
                max_concurrent_trials=_at_once(resources),
                reuse_actors=resources.workers == 1,
            ),
            run_config=ray.tune.RunConfig(
                name=study.name,
                storage_path=study.storage,
                verbose=0,
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=1),
                callbacks=[Progress(options.trials, study.config.train.epochs)],
            ),
        )
    results = tuner.fit()
    return [_outcome(results[index]) for index in range(len(results))]


def _optuna(options: Options, name: str) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runs_dir().mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return OptunaSearch(
            space.suggest,
            metric="best/score",
            mode="max",
            points_to_evaluate=list(space.FIRST_POINTS),
            sampler=space.sampler(options.seed, startup=max(4, options.trials // 4)),
            study_name=name,
            storage=optuna.storages.RDBStorage(f"sqlite:///{runs_dir() / 'optuna.db'}"),
        )


def _at_once(resources: session.Resources) -> int:
    """Trials that fit into the cluster together: more drivers than workers' places would only wait for each other."""
    total = ray.cluster_resources()
    fits = [total.get(name, 0) // (each * resources.workers) for name, each in resources.per_worker.items()]
    return max(1, int(min(fits)))


def _outcome(result: ray.tune.Result) -> Outcome:
    metrics = result.metrics or {}
    settings = {name: value for name, value in (result.config or {}).items() if name not in ("number", "tcm")}
    path = metrics.get("checkpoint_path") or (result.checkpoint.path if result.checkpoint else "")
    state = "failed" if result.error else "finished" if metrics.get("done") else "unfinished"
    return Outcome(
        number=int((result.config or {})["number"]),
        state=state,
        settings=settings,
        metrics={name: value for name, value in metrics.items() if isinstance(value, float | int)},
        checkpoint=path,
        run_id=metrics.get("run_id", ""),
        seconds=metrics.get("time_total_s", 0.0),
        error=last_line(str(result.error)) if result.error else "",
    )


def _finish(outcomes: list[Outcome], chosen: Outcome, study: Study, record: Writer, *, toy: bool) -> None:
    """Table, test classes, figures, registry."""
    report.print_trials(outcomes, chosen)
    reference = baseline(outcomes)
    models = [chosen] if reference is None or reference is chosen else [chosen, reference]
    tested = promote.test([model.checkpoint for model in models], study.resources)
    winning, before = tested[0], None if reference is None else tested[-1]
    report.print_test(before, winning, toy=toy)
    if reference is chosen:
        print("No margins beat the baseline within the tolerance: the champion is the encoder without TCM.")
    record.summary({**report.summary(before, winning), "val/winner/score": chosen.score})
    record.tags({"winner": str(chosen.number)})
    if before is not None and before.curves is not None and winning.curves is not None:
        figure = plots.compare_utility(before.curves, winning.curves, c=study.config.evaluate.utility_c)
        record.figure(figure, "figures/utility.png")
    rows = [
        {"number": o.number, "recall": o.recall, "opis": o.opis, "state": _state(o, chosen)}
        for o in outcomes
        if o.state == "finished"
    ]
    record.figure(plots.search_scatter(rows), "figures/search.png")
    version = promote.register(chosen.checkpoint, winning, run_id=chosen.run_id)
    record.tags({"champion": f"{version.name}/{version.version}"})
    print(f"registered {version.name} version {version.version}, alias champion (trial {chosen.number})")


def _state(outcome: Outcome, chosen: Outcome) -> str:
    return "winner" if outcome is chosen else "baseline" if outcome.number == 0 else "other"


def _stop(outcomes: list[Outcome], options: Options, study: Study, words: list[str]) -> NoReturn:
    """Says how to go on after Ctrl-C, and leaves no run behind that looks alive."""
    study.store.end_children(study.parent)
    done = sum(outcome.state != "unfinished" for outcome in outcomes)
    again = " ".join(word for word in words if word != "--resume")
    print(f"\ninterrupted: {done} of {options.trials} trials are done and kept. Go on with:")
    print(f"  python -m tune.search {again}{' ' if again else ''}--resume")
    raise SystemExit(130)


def _overhead() -> str:
    seconds = Progress.latest.overhead if Progress.latest is not None else None
    if seconds is None or not seconds.later:
        return "trial overhead: every trial was the first of its process"
    first = f"; the first of a process {median(seconds.first):.2f} s" if seconds.first else ""
    return f"trial overhead: {median(seconds.later):.2f} s (median of {len(seconds.later)} outside the loop{first})"


def _name(options: Options, storage: str) -> str:
    name = command_line.run_name(options.name, options.config.data.dataset)
    if not options.resume:
        if (Path(storage) / name).exists():
            raise ValueError(f"name: there is a search {name} in {storage} already; --resume goes on with it")
        return name
    if options.name:
        if "://" not in storage and not (Path(storage) / name / "tuner.pkl").exists():
            raise ValueError(f"--resume: there is no search {name} in {storage}")
        return name
    if "://" in storage:
        raise ValueError("--resume with a remote --storage needs the --name of the search")
    found = sorted(Path(storage).glob("*/tuner.pkl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"--resume: there is no search to go on with in {storage}")
    return found[-1].parent.name


def _params(options: Options, config: Config) -> dict[str, object]:
    return {
        **config.flat,
        "objective.weight": options.objective.weight,
        "objective.tolerance": options.objective.tolerance,
        "trials": options.trials,
        "workers_per_trial": options.workers_per_trial,
        "seed": options.seed,
    }


def _budget(words: list[str]) -> str:
    full = any(word == "full" and before == "--budget" for before, word in pairwise(words))
    return "" if full or "--budget=full" in words else " (short budget: a first look; --budget full trains to the end)"


if __name__ == "__main__":
    raise SystemExit(main())
