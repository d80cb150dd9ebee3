"""The model that a person names for promotion: an MLflow run, a folder of checkpoints, or a registered version."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train

from cluster import registry, session
from cluster.run_folder import RunFolder
from cluster.tracking import PARENT_TAG, Found, Store
from dml import checkpoint
from tune.objective import Outcome

FORMS = "a run id of MLflow (32 hex digits), a checkpoint folder or a run's, models:/NAME@ALIAS, models:/NAME/VERSION"

MODELS = "models.json"
"""Artifact of a search: a row for each trial and final that finished, where its model lies."""


@dataclass(frozen=True)
class Candidate:
    """A model that may become champion.

    Attributes:
        label: what messages call it.
        checkpoint: path or URI of its folder.
        run_id: the MLflow run that trained it; empty when this store has none.
        version: what it is registered as, if it is.
        baseline: path or URI of the checkpoint of its search's trial without TCM; empty when there is none.
    """

    label: str
    checkpoint: str
    run_id: str = ""
    version: registry.ModelVersion | None = None
    baseline: str = ""


def rows(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """What MODELS lists of finished trials and finals; each run once."""
    finished = {outcome.run_id: outcome for outcome in outcomes if outcome.state == "finished" and outcome.checkpoint}
    return [
        {"run_id": run_id, "trial": o.number, "seed": o.settings.get("train.seed"), "checkpoint": o.checkpoint}
        for run_id, o in finished.items()
    ]


def find(named: str, store: Store) -> Candidate:
    """Finds the model.

    Args:
        named: one of FORMS. Of a search's own run, the version that it registered.
        store: where runs are.

    Raises:
        ValueError: there is no such thing, or no model in it; the message says what would do.
        TrackingError: the server does not answer, or refuses.
    """
    if named.startswith("models:"):
        version = registry.find(named)
        if version is None:
            raise ValueError(f"{named} is not in the MLflow registry")
        return Candidate(version.label, str(registry.download(version)), version.run_id, version)
    folder = Path(named)
    if re.fullmatch(r"[0-9a-f]{32}", named) and not folder.exists():
        return _of_run(named, store)
    if "://" in named:
        return _of_folder(named, named.rstrip("/"), store)
    if not folder.is_dir():
        raise ValueError(f"there is no {named!r}; valid: {FORMS}")
    return _of_folder(named, session.local_path(named), store)


def _of_run(run_id: str, store: Store) -> Candidate:
    found = store.find(run_id)
    if found is None:
        raise ValueError(f"the MLflow store has no run {run_id}; valid: {FORMS}")
    if "registered" in found.tags:
        return find(f"models:/{found.tags['registered']}", store)
    label = f"run {run_id}"
    if "checkpoint" in found.tags:
        return Candidate(label, found.tags["checkpoint"], run_id)
    search = _models(found, store)
    own = next((row for row in search if row["run_id"] == run_id), None)
    if own is None:
        raise ValueError(
            f"{label} ({found.tags.get('kind', 'of another program')}) has no checkpoint: it, or the search that it "
            "belongs to, has not come to its end, it was stopped early, or it is of a kind that keeps none"
        )
    return Candidate(label, own["checkpoint"], run_id, baseline=_baseline(own, search))


def _models(found: Found, store: Store) -> list[dict[str, Any]]:
    """The rows of MODELS of the search that a run belongs to."""
    parent = found.tags.get(PARENT_TAG, "")
    return (store.json(parent, MODELS) or []) if parent else []


def _baseline(own: Mapping[str, Any], search: Sequence[Mapping[str, Any]]) -> str:
    """The checkpoint of the trial without TCM of the same seed."""
    same = [row["checkpoint"] for row in search if row["trial"] == 0 and row["seed"] == own["seed"]]
    return same[0] if same and own["trial"] != 0 else ""


def _of_folder(named: str, path: str, store: Store) -> Candidate:
    storage, _, name = path.rpartition("/")
    best = path if _is_checkpoint(path) else RunFolder(storage, name).best()
    if not best:
        raise ValueError(f"{named} holds no checkpoint that is whole; valid: {FORMS}")
    with ray.train.Checkpoint(best).as_directory() as folder:
        run_id = str(checkpoint.load(folder).info.get("report", {}).get("run_id", ""))
    found = store.find(run_id) if run_id else None
    if found is None:
        return Candidate(named, best)
    search = _models(found, store)
    own = next((row for row in search if row["run_id"] == run_id), None)
    return Candidate(named, best, run_id, baseline=_baseline(own, search) if own is not None else "")


def _is_checkpoint(path: str) -> bool:
    import pyarrow.fs

    filesystem, inside = pyarrow.fs.FileSystem.from_uri(path)
    return bool(filesystem.get_file_info(f"{inside}/config.json").type != pyarrow.fs.FileType.NotFound)
