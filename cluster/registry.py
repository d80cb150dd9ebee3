"""Registered models in MLflow: versions of a checkpoint, and the aliases that say which one is served.

A version carries two forms of the same encoder, neither with pickle: our checkpoint folder, which `dml.checkpoint`
loads, and MLflow's own PyTorch flavour (a torch.export program), which anybody loads with `mlflow.pytorch.load_model`.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import delivery, tracking
from dml import checkpoint

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

NAME = "onethreshold"
ALIAS = "champion"
OPERATING_POINTS = "operating_points.json"
MODEL_CARD = "model_card.md"
EVALUATION = "evaluation.json"
DESCRIPTION = 5000
"""Characters that MLflow's databases hold of a version's description."""
REMEMBERED = 50
"""Champions of the past that can be rolled back to."""


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model.

    Attributes:
        name: registered model.
        version: 1, 2, ... within that name.
        run_id: the MLflow run that trained it.
        source: URI of its files, models:/m-...
    """

    name: str
    version: int
    run_id: str
    source: str

    @property
    def label(self) -> str:
        """What answers carry: onethreshold@3."""
        return f"{self.name}@{self.version}"


def check_name(name: str) -> None:
    """Refuses what no registered model can be called.

    Raises:
        ValueError: the name, and what would be valid.
    """
    if not re.fullmatch(r"[^/:.\s][^/:]*", name):
        raise ValueError(
            f"model-name: {name!r} is no name of a registered model; valid: any without '/' and ':' that does not "
            "begin with '.' or a space"
        )


def register(
    folder: Path,
    *,
    run_id: str,
    operating_points: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, float],
    name: str = NAME,
    tags: Mapping[str, str] | None = None,
    card: str = "",
    evaluation: Mapping[str, Any] | None = None,
) -> ModelVersion:
    """Registers a checkpoint folder as a new version of a registered model.

    Args:
        folder: a folder written by `dml.checkpoint.save`.
        run_id: MLflow run that the version belongs to; neither its status nor the active run is changed.
        operating_points: FAR targets and their thresholds, stored as operating_points.json.
        metrics: figures shown with the version, as its tags; recall@1 becomes recall_at_1, since MLflow refuses "@".
        name: registered model; created when it is new.
        tags: further tags of the version.
        card: Markdown, for the version's description and model_card.md.
        evaluation: plain values about how the model was tested, for evaluation.json.

    Returns:
        The version; no alias points to it yet.

    Raises:
        CheckpointError: the folder is no usable checkpoint.
        MlflowException: the run is unknown, or the tracking server fails.
    """
    import mlflow.pytorch
    from mlflow.exceptions import MlflowException

    client = _client()
    loaded = checkpoint.load(folder)
    figures = {_tag(key): f"{value:.6g}" for key, value in metrics.items()}
    tags = {"format": "checkpoint+pt2", **figures, **(tags or {})}
    logged = client.create_logged_model(
        experiment_id=client.get_run(run_id).info.experiment_id, name=name, source_run_id=run_id, tags=tags
    )
    data = loaded.config.data
    with tempfile.TemporaryDirectory() as scratch:
        documents = {OPERATING_POINTS: json.dumps([dict(point) for point in operating_points], indent=2)}
        if card:
            documents[MODEL_CARD] = card
        if evaluation is not None:
            documents[EVALUATION] = json.dumps(evaluation, indent=2)
        written = [Path(scratch) / document for document in documents]
        for path in written:
            path.write_text(documents[path.name])
        mlflow.pytorch.log_model(
            loaded.encoder,
            name=name,
            model_id=logged.model_id,
            run_id=run_id,
            tags=tags,
            # Two images, since torch.export would fix a batch dimension of one.
            input_example=_zeros(2, data.channels, data.image_size),
            signature=_signature(data.channels, data.image_size, loaded.config.encoder.dim),
            serialization_format="pt2",
            pip_requirements=_requirements(),
            extra_files=[str(file) for file in [*checkpoint.model_files(folder), *written]],
            validate_serving_input=False,
        )
    # By the client: log_model's own way to a version prints lines that our callers do not want.
    source = f"models:/{logged.model_id}"
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        name, source, run_id=run_id, tags=tags, model_id=logged.model_id, description=card[:DESCRIPTION] or None
    )
    return ModelVersion(name, int(created.version), run_id, source)


def tag(version: ModelVersion, tags: Mapping[str, str]) -> None:
    """Sets tags of a version."""
    client = _client()
    for key, value in tags.items():
        client.set_model_version_tag(version.name, str(version.version), key, value)


def tags(version: ModelVersion) -> dict[str, str]:
    """The tags of a version.

    Raises:
        MlflowException: it is not there, or the tracking server cannot be reached, or refuses.
    """
    return dict(_client().get_model_version(version.name, str(version.version)).tags)


def untag(version: ModelVersion, key: str) -> None:
    """Removes a tag of a version."""
    _client().delete_model_version_tag(version.name, str(version.version), key)


def promote(version: ModelVersion, alias: str = ALIAS) -> None:
    """Points an alias of the registered model to a version; services that follow the alias change over.

    The version that it pointed to before is remembered for `rollback`.
    """
    client = _client()
    present = champion(version.name, alias)
    if present is not None and present.version != version.version:
        _remember(version.name, alias, [*_past(version.name, alias, but=present), present.version])
    client.set_registered_model_alias(version.name, alias, str(version.version))


def rollback(name: str = NAME, alias: str = ALIAS) -> tuple[ModelVersion, ModelVersion]:
    """Points an alias back to the version that it pointed to before; again, to the one before that.

    Returns:
        The version that it pointed to, and the one that it points to now.

    Raises:
        ValueError: no version has this alias, or none had it before; what can be done is said.
        MlflowException: the tracking server cannot be reached, or refuses.
    """
    present = champion(name, alias)
    if present is None:
        raise ValueError(f"{name} has no {alias} in the MLflow registry, so there is nothing to roll back")
    past = _past(name, alias, but=present)
    while past:
        before = find(f"models:/{name}/{past.pop()}")
        if before is not None and before.version != present.version:
            # The alias first: what is remembered of the present one is left out when it is read.
            _client().set_registered_model_alias(name, alias, str(before.version))
            _remember(name, alias, past)
            return present, before
    raise ValueError(
        f"{present.label} is {alias} and no version that is still there was {alias} before it; "
        f"python -m tune.promote models:/{name}/VERSION --promote always points it to any"
    )


def champion(name: str = NAME, alias: str = ALIAS) -> ModelVersion | None:
    """The version that an alias points to; None when there is no such model or alias.

    Raises:
        MlflowException: the tracking server cannot be reached, or refuses.
    """
    return find(f"models:/{name}@{alias}")


def find(uri: str) -> ModelVersion | None:
    """The version that models:/NAME@ALIAS or models:/NAME/VERSION names; None when there is none.

    Raises:
        ValueError: the URI has another form.
        MlflowException: the tracking server cannot be reached, or refuses.
    """
    from mlflow.exceptions import MlflowException

    name, alias, number = parse(uri)
    client = _client()
    try:
        if number is None:
            number = client.get_registered_model(name).aliases.get(alias)
            if number is None:
                return None
        found = client.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return ModelVersion(name, int(found.version), str(found.run_id), str(found.source))


def parse(uri: str) -> tuple[str, str | None, int | None]:
    """Name, alias and version of models:/NAME@ALIAS (version None) or models:/NAME/VERSION (alias None).

    Raises:
        ValueError: the URI has another form.
    """
    body = uri.removeprefix("models:/")
    name, at, alias = body.partition("@")
    if at and name and alias and body != uri:
        return name, alias, None
    name, _, number = body.partition("/")
    if name and number.isdecimal() and body != uri:
        return name, None, int(number)
    raise ValueError(f"{uri!r} names no registered model; valid: models:/NAME@ALIAS, models:/NAME/VERSION")


def download(version: ModelVersion) -> Path:
    """A local folder with the version's checkpoint files and operating_points.json.

    Kept under models/ in the folder that ONETHRESHOLD_CACHE names (else ~/.cache/onethreshold): fetched once.

    Raises:
        MlflowException: the files cannot be fetched.
    """
    import mlflow.artifacts

    folder = _folder(version)
    if folder.is_dir():
        return folder
    cache = folder.parent
    _client()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        files = mlflow.artifacts.download_artifacts(
            f"models:/{version.name}/{version.version}/extra_files", dst_path=scratch
        )
        try:
            # A rename, so that a folder is complete or absent, whoever else downloads it now.
            Path(files).rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def remember(uri: str, version: ModelVersion) -> None:
    """Notes in the cache which version a models: URI named, for `recall`."""
    path = _memory(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".remember-", delete=False) as scratch:
        json.dump(asdict(version), scratch)
        scratch.flush()
        os.fsync(scratch.fileno())
    # A rename, so that it is never half-written, whoever else remembers it now.
    Path(scratch.name).replace(path)


def recall(uri: str) -> ModelVersion | None:
    """The version that a models: URI named the last time, for when the registry is down.

    None where nothing was remembered, or its files are no longer in the cache.
    """
    path = _memory(uri)
    if not path.is_file():
        return None
    version = ModelVersion(**json.loads(path.read_text()))
    return version if _folder(version).is_dir() else None


def fetch(model: str) -> tuple[Path, str]:
    """A local checkpoint folder, and the name that it goes by.

    Args:
        model: a checkpoint folder, models:/NAME@ALIAS or models:/NAME/VERSION.

    Returns:
        The folder; its own name, or NAME@VERSION.

    Raises:
        ValueError: the registry has no such model.
        TrackingError: the tracking server cannot be reached, or refuses.
    """
    if not model.startswith("models:"):
        return Path(model), Path(model).resolve().name
    with tracking.one_line(tracking.connect()):
        version = find(model)
        if version is None:
            raise ValueError(f"{model} is not in the MLflow registry; python -m tune.search registers a champion")
        return download(version), version.label


def pinned(label: str) -> str:
    """The URI of a version by its label: models:/onethreshold/3 of onethreshold@3."""
    return f"models:/{label.replace('@', '/')}"


def _cache() -> Path:
    return Path(os.environ.get("ONETHRESHOLD_CACHE") or Path.home() / ".cache" / "onethreshold")


def _folder(version: ModelVersion) -> Path:
    return _cache() / "models" / f"{version.label}-{version.source.rpartition('/')[2]}"


def _memory(uri: str) -> Path:
    # Of the store as well: two may have a model of this name.
    store = os.environ.get("MLFLOW_TRACKING_URI", "")
    return _cache() / "resolved" / f"{hashlib.sha256(f'{store} {uri}'.encode()).hexdigest()[:24]}.json"


def _past(name: str, alias: str, *, but: ModelVersion) -> list[int]:
    """Versions that had an alias before, oldest first; the last of them is not the present one."""
    listed = _client().get_registered_model(name).tags.get(f"{alias}.before", "")
    past = [int(number) for number in listed.split(",") if number.strip().isdecimal()]
    while past and past[-1] == but.version:
        past.pop()
    return past


def _remember(name: str, alias: str, past: Sequence[int]) -> None:
    _client().set_registered_model_tag(name, f"{alias}.before", ",".join(map(str, past[-REMEMBERED:])))


def _client() -> "MlflowClient":
    return delivery.client_of(tracking.connect())


def _tag(metric: str) -> str:
    return metric.replace("@", "_at_")


def _zeros(batch: int, channels: int, size: int) -> Any:
    import numpy as np

    return np.zeros((batch, channels, size, size), dtype=np.float32)


def _signature(channels: int, size: int, dim: int) -> "ModelSignature":
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    images = TensorSpec(np.dtype(np.float32), (-1, channels, size, size), "images")
    embeddings = TensorSpec(np.dtype(np.float32), (-1, dim), "embeddings")
    return ModelSignature(inputs=Schema([images]), outputs=Schema([embeddings]))


def _requirements() -> list[str]:
    """Given to MLflow, which otherwise loads the model in a subprocess to find them out."""
    from importlib.metadata import version

    return [f"{package}=={version(package).partition('+')[0]}" for package in ("mlflow", "numpy", "torch")]
