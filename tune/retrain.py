"""The last training: chosen settings and the baseline's once more, on train and most of val.

The val classes that are left choose the epoch, as in every training, and set the thresholds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from cluster import measure, session, train
from cluster.run_folder import RunFolder
from cluster.tracking import Store
from cluster.worker import Job, tracked
from dml import loop
from dml.config import Config
from dml.data import datasets
from dml.data.imageset import digest
from tune.objective import Outcome


@dataclass(frozen=True)
class Place:
    """Where a last training runs and is kept.

    Attributes:
        name: of the search or promotion that it belongs to; an interrupted training of it goes on.
        resources: what it trains with.
        storage: absolute path or URI.
        store: the MLflow store.
        parent: MLflow run id of the search or promotion.
    """

    name: str
    resources: session.Resources
    storage: str
    store: Store
    parent: str


@dataclass(frozen=True)
class Retrained:
    """A model of a last training.

    Attributes:
        checkpoint: path or URI of the best epoch's checkpoint.
        run_id: its MLflow run.
        metrics: the last report of `cluster.worker.work`.
    """

    checkpoint: str
    run_id: str
    metrics: dict[str, float]


def changed(config: Config, share: float) -> Config:
    """The settings with this share of the val classes in train.

    Raises:
        ValueError: no share of val, or val has no class to give, or what it keeps cannot calibrate; says what can.
        DataError: data that cannot be read.
    """
    if not 0 < share < 1:
        raise ValueError(f"retrain: {share:g} is no share of the val classes; valid: above 0 and below 1, such as 0.75")
    config = config.replace(**{"data.train_on_val": share})
    before = datasets.load(config.data.model_copy(update={"train_on_val": 0.0})).val
    splits = datasets.load(config.data)
    if len(splits.val.classes) == len(before.classes):
        raise ValueError(
            f"retrain: of {len(before.classes)} val classes, 2 of which must stay to set thresholds, a share of "
            f"{share:g} is none to train on; a larger share, or more val classes with data.val_fraction"
        )
    try:
        loop.check(splits, config)
    except ValueError as error:
        raise ValueError(f"retrain: with {share:g} of the val classes in train, {error}") from None
    return config


def both(
    winner: Outcome, baseline: Outcome | None, config: Config, share: float, place: Place
) -> tuple[Outcome, Outcome | None]:
    """The winner of a search and its baseline, trained once more.

    Args:
        winner: whose settings are trained; may be the baseline.
        baseline: None where it failed.
        config: of the search, which these settings change.
        share: of the val classes that train too.
        place: where.

    Returns:
        Both with the checkpoint, run and figures of their last training; of val, these are of other classes.
    """

    def again(outcome: Outcome, side: str) -> Outcome:
        print(f"training the {side} once more, with {share:.0%} of the val classes in train", flush=True)
        trained = run(changed(config.replace(**outcome.settings), share), side, place)
        return replace(outcome, checkpoint=trained.checkpoint, run_id=trained.run_id, metrics=trained.metrics)

    again_winner = again(winner, "winner")
    if baseline is None:
        return again_winner, None
    return again_winner, again_winner if baseline is winner else again(baseline, "baseline")


def run(
    config: Config, side: str, place: Place, *, init: Mapping[str, Tensor] | None = None, init_from: str = ""
) -> Retrained:
    """Trains, or goes on, and keeps the best epoch's checkpoint; what has ended is not trained again.

    Args:
        config: of `changed`.
        side: winner or baseline, for names.
        place: where.
        init: first weights, as of a `cluster.worker.Job`.
        init_from: where these came from.

    Raises:
        TrainingError: it cannot go on; the message carries a rank and its error.
        TrackingError: the server does not answer, or refuses.
    """
    # By its settings: a search that went on may have another winner than the one that was trained before.
    folder = f"{place.name}-retrained-{side}-{digest(config.model_dump_json())[:8]}"
    job = Job(
        config,
        f"retrained {side}",
        place.store,
        parent=place.parent,
        key=f"{place.parent}/{folder}",
        tags={"kind": "retrained"},
        init=init,
        init_from=init_from,
    )
    with tracked(job, patience=0) as job:
        assert job.run is not None
        trained = train.fit(job, place.resources, RunFolder(place.storage, folder))
        measure.keep_best(job.run, trained.checkpoint, place.resources, figures=False)
    metrics = {name: value for name, value in trained.metrics.items() if isinstance(value, float | int)}
    return Retrained(trained.checkpoint, job.run.run_id, metrics)
