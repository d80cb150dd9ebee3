"""One trial of a search, as it runs on a worker."""

import itertools
import uuid
from dataclasses import dataclass
from pathlib import Path

import ray.train
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from cluster import session, train
from cluster.failures import as_training_error
from cluster.run_folder import RunFolder
from cluster.tracking import Store
from cluster.worker import Job, tracked, work
from dml.config import Config
from tune.early_stopping import ENDED
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
        # A trial's reports are of evaluated epochs, which is what searchers compare.
        config=study.config.replace(**settings(params), **{"train.checkpoint_every_steps": None}),
        name=name,
        store=study.store,
        parent=study.parent,
        key=f"{study.name}/{number}" + ("" if seed is None else f"/seed {seed}"),
        tags=tags,
    )
    with tracked(job) as job:
        if study.resources.workers == 1:
            _in_this_process(job)
        else:
            _over_workers(job, study)


def _in_this_process(job: Job) -> None:
    before = next(_trials_of_this_process)

    def report(metrics: dict[str, float | str], folder: Path | None) -> None:
        kept = ray.tune.Checkpoint.from_directory(folder) if folder is not None else None
        ray.tune.report({**metrics, "trials_before_in_process": before}, checkpoint=kept)

    try:
        last = work(job, report, device=session.use_device())
    except Exception as error:
        raise as_training_error(0, error) from error  # its cause in one line, as of several workers
    ray.tune.report({**last, "trials_before_in_process": before, ENDED: True})


def _over_workers(job: Job, study: Study) -> None:
    # A new name each time: a trial that is run again after an interruption begins anew, as in a single process, and
    # Ray Train would otherwise take up the record of the first time.
    name = f"{study.name}-trial-{job.tags['trial']}-{uuid.uuid4().hex[:8]}"
    callbacks = [TuneReportCallback()]
    trained = train.fit(job, study.resources, RunFolder(study.storage, name), callbacks=callbacks)
    # The last report's path is that of the last checkpoint.
    ray.tune.report({**trained.metrics, "checkpoint_path": trained.checkpoint, ENDED: True})
