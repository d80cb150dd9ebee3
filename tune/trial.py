"""One trial of a search, as it runs on a worker."""

import itertools
import uuid
from dataclasses import dataclass
from pathlib import Path

import ray.train
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from cluster import session, train
from cluster.tracking import Store
from cluster.worker import Job, work
from dml.config import Config
from tune.early_stopping import ENDED
from tune.ranges import Value
from tune.space import Point, settings

_trials_of_this_process = itertools.count()


@dataclass(frozen=True)
class Study:
    """What all trials of a search share.

    Attributes:
        name: of the search.
        config: the settings that trials vary.
        resources: what each trial trains with.
        storage: where checkpoints go.
        store: the MLflow store.
        parent: MLflow run id of the search.
    """

    name: str
    config: Config
    resources: session.Resources
    storage: str
    store: Store
    parent: str


def trial_key(study: str, number: int, seed: Value) -> str:
    """What names the MLflow run of a trial once and for all.

    Args:
        study: name of the search.
        number: of the trial.
        seed: of a finalist's training; None in the search itself.
    """
    return f"{study}/{number}" if seed is None else f"{study}/{number}/seed {seed}"


def run(params: Point, study: Study) -> None:
    """Trains with these parameters and reports to Ray Tune.

    One worker trains inside this process, which Tune reuses for the next trial; more are a Ray Train job.

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
        config=study.config.replace(**settings(params)),
        name=name,
        store=study.store,
        parent=study.parent,
        key=trial_key(study.name, number, seed),
        tags=tags,
    )
    if study.resources.workers == 1:
        _in_this_process(job)
    else:
        _over_workers(job, study)


def _in_this_process(job: Job) -> None:
    before = next(_trials_of_this_process)

    def report(metrics: dict[str, float | str], folder: Path | None) -> None:
        kept = ray.tune.Checkpoint.from_directory(folder) if folder is not None else None
        ray.tune.report({**metrics, "trials_before_in_process": before}, checkpoint=kept)

    ray.tune.report({**work(job, report, device=session.use_device()), "trials_before_in_process": before, ENDED: True})


def _over_workers(job: Job, study: Study) -> None:
    # A new name each time: a trial that is run again after an interruption begins anew, as in a single process, and
    # Ray Train would otherwise take up the record of the first time.
    name = f"{study.name}-trial-{job.tags['trial']}-{uuid.uuid4().hex[:8]}"
    callbacks = [TuneReportCallback()]
    result = train.fit(job, study.resources, name=name, storage=study.storage, callbacks=callbacks)
    if result.metrics is None or result.checkpoint is None:
        raise RuntimeError(f"{job.name} ended without a report")
    # The last epoch's report carries no path when an earlier epoch was the best.
    ray.tune.report({**result.metrics, "checkpoint_path": result.checkpoint.path, ENDED: True})
