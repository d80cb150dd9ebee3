"""One trial of a search, as it runs on a worker."""

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from cluster import session, train
from cluster.failures import TrainingError, as_training_error
from cluster.run_folder import RunFolder
from cluster.tracking import Store
from cluster.worker import Job, tracked, work
from dml.config import Config
from dml.state import State
from tune.early_stopping import ENDED
from tune.optuna_search import ERROR
from tune.ranges import Value
from tune.space import Point, settings

log = logging.getLogger(__name__)
_trials_of_this_process = itertools.count()


@dataclass(frozen=True)
class Study:
    """What all trials of a search share.

    Attributes:
        name: of the search.
        key: names its MLflow run.
        config: the settings that trials vary.
        resources: what each trial trains with.
        storage: where all that is kept goes, each search in a folder of its name.
        store: the MLflow store.
        parent: MLflow run id of the search.
    """

    name: str
    key: str
    config: Config
    resources: session.Resources
    storage: str
    store: Store
    parent: str

    @property
    def folder(self) -> str:
        """Path or URI of the search's folder; the trials have theirs in it."""
        return f"{self.storage}/{self.name}"


def trial_key(study: str, number: int, seed: Value) -> str:
    """What names the MLflow run of a trial once and for all.

    Args:
        study: what names the search's run.
        number: of the trial.
        seed: of a finalist's training; None in the search itself.
    """
    return f"{study}/{number}" if seed is None else f"{study}/{number}/seed {seed}"


def run(params: Point, study: Study) -> None:
    """Trains with these parameters and reports to Ray Tune.

    One worker trains inside this process, which Tune reuses for the next trial; more are a Ray Train job. A trial that
    was begun before goes on from its newest checkpoint; one that had ended says so again. One that fails reports its
    error; what is lost with its process is for Tune to begin again.

    Args:
        params: "number", and dotted settings (`space.settings`); "train.seed" where a finalist is trained again.
        study: what trials share.
    """
    number, seed = int(str(params["number"])), params.get("train.seed")
    name = f"trial {number}" if number else "trial 0 (baseline without TCM)"
    tags = {"kind": "trial", "trial": str(number)}
    if seed is not None:
        name, tags = f"{name}, seed {seed}", {**tags, "kind": "final", "seed": str(seed)}
    job = Job(
        # A trial's reports are of evaluated epochs, which is what searchers compare.
        config=study.config.replace(**settings(params), **{"train.checkpoint_every_steps": None}),
        name=name,
        store=study.store,
        parent=study.parent,
        key=trial_key(study.key, number, seed),
        tags=tags,
    )
    folder = RunFolder(study.folder, f"trial-{number}" + ("" if seed is None else f"-seed-{seed}"))
    before = next(_trials_of_this_process)
    try:
        with tracked(job) as job:
            report = folder.ended()
            if report is None:
                report = _train(job, study, folder)
                folder.end(report)
    except Exception as error:
        cause = str(error) if isinstance(error, TrainingError) else f"{type(error).__name__}: {error}"
        report = {ERROR: " ".join(cause.split())}
        log.warning("%s failed", name, exc_info=error)
    ray.tune.report({**report, "trials_before_in_process": before, ENDED: True})


def _train(job: Job, study: Study, folder: RunFolder) -> dict[str, Any]:
    found = folder.newest()
    for problem in found.unusable:
        log.warning("%s; the checkpoint before it is used", problem)
    resumed = {"resumed": found.state is not None}
    if found.state is not None:
        # Which whoever took the reports may not have got before the end.
        ray.tune.report({**found.state.info["report"], **resumed})
    if study.resources.workers == 1:
        return {**_in_this_process(job, folder, found.state), **resumed}
    trained = train.fit(job, study.resources, folder, callbacks=[TuneReportCallback()])
    return {**trained.metrics, "checkpoint_path": trained.checkpoint, **resumed}


def _in_this_process(job: Job, place: RunFolder, resume: State | None) -> dict[str, Any]:
    def report(metrics: dict[str, float | str], folder: Path | None) -> None:
        # Before the report, at which Tune may stop the trial.
        if folder is not None:
            place.keep(folder, int(metrics["step"]))
        ray.tune.report(metrics)

    try:
        metrics = work(job, report, device=session.use_device(), resume=resume, every=True)
    except Exception as error:
        raise as_training_error(0, error) from error  # its cause in one line, as of several workers
    return {**metrics, "checkpoint_path": place.best()}
