"""Whether a model beats the champion: both measured anew, on val classes that neither was trained on.

The rule is the search's own, with the champion in the baseline's place: the better by the objective, where Recall@1
lies at most the tolerance below the champion's. Equal figures leave the champion where it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import ray
import torch

from cluster import registry, session
from dml import checkpoint, evaluate
from dml.config import DataConfig, EvaluateConfig
from dml.data import datasets
from tune.objective import Objective, Outcome, winner


class IncomparableError(ValueError):
    """Two models that cannot be compared fairly; the message says why."""


@dataclass(frozen=True)
class Result:
    """A model beside the champion.

    Attributes:
        won: it beats the champion.
        classes: val classes that it was measured on.
        figures: recall@1, opis, score and whatever else `dml.evaluate.measure` gives, of the model.
        champion: the same of the champion.
    """

    won: bool
    classes: int
    figures: dict[str, float]
    champion: dict[str, float]

    def __str__(self) -> str:
        shown = (("Recall@1", "recall@1", 4), ("OPIS", "opis", 5), ("score", "score", 4))
        figures = ", ".join(
            f"{label} {self.figures[name]:.{digits}f} against {self.champion[name]:.{digits}f}"
            for label, name, digits in shown
        )
        return f"{figures} on {self.classes} val classes that neither was trained on"


@dataclass(frozen=True, eq=False)
class Contender:
    """A model with all that it learnt from.

    Attributes:
        label: what messages call it.
        model: with its encoder.
        ancestors: the models whose weights it started from, and those that these did, without encoders: label, data and
            fingerprint.
    """

    label: str
    model: checkpoint.Checkpoint
    ancestors: tuple[tuple[str, DataConfig, str], ...] = field(default=())

    @classmethod
    def of(cls, label: str, model: checkpoint.Checkpoint) -> "Contender":
        """Finds the models that it started from.

        Raises:
            IncomparableError: one of them cannot be read, so that nobody knows what it was trained on.
        """
        found = []
        source = str(model.info.get("init") or "")
        while source:
            try:
                before = checkpoint.load(registry.fetch(source)[0])
            except ValueError as error:
                raise IncomparableError(f"{label} started from {source}, which cannot be read: {error}") from None
            found.append((source, before.config.data, str(before.info.get("fingerprint", ""))))
            source = str(before.info.get("init") or "")
        return cls(label, model, tuple(found))


def challenge(challenger: Contender, champion: Contender, objective: Objective, resources: session.Resources) -> Result:
    """Measures both where the training ran.

    Args:
        challenger: whose data and calibration range are used.
        champion: the present one.
        objective: decides between them.
        resources: what one worker may take.

    Raises:
        IncomparableError: no classes are left that neither was trained on, or nobody can tell which these are.
    """
    task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)(_challenge)
    found: Result | str = ray.get(task.remote(challenger, champion, objective))
    if isinstance(found, str):
        raise IncomparableError(found)
    return found


def _challenge(challenger: Contender, champion: Contender, objective: Objective) -> Result | str:
    """As a Ray task, which would wrap an error in its traceback."""
    try:
        return compare(challenger, champion, objective, session.use_device())
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def compare(challenger: Contender, champion: Contender, objective: Objective, device: torch.device) -> Result:
    """`challenge`, in this process.

    Raises:
        IncomparableError: see `challenge`.
        DataError: data that cannot be read.
    """
    names = unseen([challenger, champion])
    judged = challenger.model.config.evaluate.model_copy(update={"score_weight": objective.weight})
    place = challenger.model.config.data
    figures, before = (_measured(side.model, place, names, judged, device) for side in (challenger, champion))
    outcomes = [
        Outcome(number, "finished", metrics={f"best/{name}": value for name, value in found.items()})
        for number, found in enumerate((before, figures))
    ]
    won = winner(outcomes, objective.tolerance, objective.mode).number == 1
    return Result(won, len(names), figures, before)


def unseen(sides: Sequence[Contender]) -> tuple[str, ...]:
    """The val classes that none of these models was trained on, nor any that it started from.

    Raises:
        IncomparableError: their data are not known, not the same, not at hand, or leave fewer than two classes.
    """
    place, own = sides[0].model.config.data, str(sides[0].model.info.get("fingerprint", ""))
    common: set[str] | None = None
    for side in sides:
        recorded = str(side.model.info.get("fingerprint", ""))
        for label, data, fingerprint in [(side.label, side.model.config.data, recorded), *side.ancestors]:
            if not fingerprint:
                raise IncomparableError(f"{label} does not say which data it was trained on")
            if fingerprint != own:
                raise IncomparableError(
                    f"{label} was trained on another split (fingerprint {fingerprint[:12]}, "
                    f"that of {sides[0].label} is {own[:12]}): what is val to one may have trained the other"
                )
            splits = datasets.load(_at(data, place))
            if splits.fingerprint != own:
                raise IncomparableError(
                    f"the data of {label} have changed since it was trained "
                    f"(fingerprint {splits.fingerprint[:12]}, then {own[:12]})"
                )
            common = {*splits.val.classes} & (common if common is not None else {*splits.val.classes})
    if not common or len(common) < 2:
        raise IncomparableError(f"{len(common or ())} val classes are left that neither was trained on; at least 2")
    return tuple(sorted(common))


def _at(data: DataConfig, place: DataConfig) -> DataConfig:
    """The same data where they lie today."""
    return data.model_copy(update={"root": place.root, "split_csv": place.split_csv, "threads": place.threads})


def _measured(
    model: checkpoint.Checkpoint, place: DataConfig, names: Sequence[str], judged: EvaluateConfig, device: torch.device
) -> dict[str, float]:
    config = model.config.model_copy(update={"data": _at(model.config.data, place)})
    val = datasets.load(config.data).val
    images = val.subset(np.flatnonzero(np.isin(val.labels_N, [val.classes.index(name) for name in names])))
    evaluate.check(images, judged)
    embeddings = evaluate.embed(model.encoder.to(device), images, config, device=device)
    return evaluate.measure(embeddings, torch.from_numpy(images.labels_N), judged)
