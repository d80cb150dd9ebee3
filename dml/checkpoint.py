"""Checkpoints: weights and config in one folder, safetensors and JSON, never pickle.

    a model
    folder/encoder.safetensors            the encoder's weights: their moving average, where one is kept
    folder/config.json                    the Config that made them
    folder/checkpoint.json                epoch, step, metrics and whatever else the writer adds
    folder/checksums.json                 SHA-256 of every other file

    what its training goes on from (dml.state), each where there is any
    folder/progress.json                  steps done, the running epoch's losses, early stopping
    folder/training_encoder.safetensors   the weights in training, where encoder.safetensors is their average
    folder/loss.safetensors               the loss's own parameters (proxies)
    folder/optimizer.safetensors          the optimiser's moments, by parameter
    folder/memory.safetensors             the cross-batch memory
    folder/plan.safetensors               the batches that an embedding-driven sampler planned

This is the only on-disk format. A folder is complete or absent: it is written beside its place and moved there at once;
one that a copy, a disk or a hand left truncated or altered is told by its checksums. Folders from before there were
checksums still load as models; a training does not go on from them.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dml import encoders
from dml.config import Config
from dml.state import Progress, State

FILES = ("encoder.safetensors", "config.json", "checkpoint.json")
CHECKSUMS = "checksums.json"
PROGRESS = "progress.json"


class CheckpointError(ValueError):
    """A folder that is no complete checkpoint; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Attributes:
        encoder: in eval mode, on the CPU; float32 (B, channels, S, S) -> (B, D) of unit norm.
        config: the Config that it was trained with.
        info: epoch, step and val metrics, as the writer gave them.
    """

    encoder: encoders.Encoder
    config: Config
    info: dict[str, Any]


def save(
    folder: Path, encoder: nn.Module, config: Config, *, info: Mapping[str, Any], state: State | None = None
) -> None:
    """Writes a checkpoint folder; an existing one of the same name is replaced only when the new one is complete.

    Args:
        folder: where.
        encoder: the encoder that config describes.
        config: how it was made.
        info: epoch, step and metrics; anything that JSON holds.
        state: what its training goes on from; None keeps the model alone.

    Raises:
        CheckpointError: a weight is NaN or infinite (nothing is written).
    """
    from safetensors.torch import save_file

    parts: dict[str, Mapping[str, Tensor]] = dict(state.parts) if state is not None else {}
    parts["encoder"] = encoder.state_dict()
    for part, tensors in parts.items():
        for key, value in tensors.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise CheckpointError(f"{part} weight {key} is not finite; the checkpoint {folder} is not written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        whole = Path(scratch) / "checkpoint"
        whole.mkdir()
        for part, tensors in parts.items():
            if tensors:
                plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                save_file(plain, whole / f"{part}.safetensors")
        (whole / "config.json").write_text(config.model_dump_json(indent=2))
        (whole / "checkpoint.json").write_text(json.dumps(dict(info), indent=2))
        if state is not None:
            (whole / PROGRESS).write_text(state.progress.model_dump_json(indent=2))
        sums = {path.name: _sha256(path) for path in sorted(whole.iterdir())}
        (whole / CHECKSUMS).write_text(json.dumps(sums, indent=2))
        if folder.exists():
            shutil.move(folder, Path(scratch) / "replaced")
        whole.rename(folder)


def load(folder: Path | str) -> Checkpoint:
    """Reads the model of a checkpoint folder; nothing that the config names is imported or downloaded.

    Raises:
        CheckpointError: a file is missing, truncated, altered, or does not fit the others.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    _check(folder, FILES)
    with _usable(folder):
        config, info = _described(folder)
        encoder = encoders.build(config.encoder.bare, channels=config.data.channels, image_size=config.data.image_size)
        encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    return Checkpoint(encoder.eval(), config, info)


def load_state(folder: Path | str) -> State:
    """Reads what a training goes on from, on the CPU; every file is held against its checksum.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or the folder holds a model alone.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    listed = _check(folder, (*FILES, PROGRESS, CHECKSUMS), whole=True)
    with _usable(folder):
        config, info = _described(folder)
        progress = Progress.model_validate_json((folder / PROGRESS).read_text())
        tensors = [folder / name for name in listed if name.endswith(".safetensors")]
        parts = {path.stem: load_file(path) for path in tensors}
    return State(config, progress, parts, info)


def warm_start(model: Checkpoint, config: Config) -> dict[str, Tensor]:
    """The encoder's weights of a checkpoint, for a new training on whatever classes.

    Args:
        model: where they come from; its loss's parameters, which belong to its classes, are left behind.
        config: of the new training.

    Returns:
        The state dict of the encoder that config describes.

    Raises:
        ValueError: the encoder that config describes is another; the message names both.
    """
    kinds = [(f"{c.encoder.name}, channels {c.data.channels}, dim {c.encoder.dim}") for c in (model.config, config)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"init: the checkpoint's encoder is {kinds[0]}; this training's is {kinds[1]}")
    own = encoders.build(config.encoder.bare, channels=config.data.channels, image_size=config.data.image_size)
    weights = model.encoder.state_dict()
    for name, value in own.state_dict().items():
        if name not in weights or weights[name].shape != value.shape:
            there = tuple(weights[name].shape) if name in weights else "none"
            raise ValueError(
                f"init: {name} has shape {there} in the checkpoint (data.image_size {model.config.data.image_size}), "
                f"but {tuple(value.shape)} in this training (data.image_size {config.data.image_size})"
            )
    return weights


def model_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that make its model."""
    return [folder / name for name in (*FILES, CHECKSUMS) if (folder / name).is_file()]


def _check(folder: Path, needed: tuple[str, ...], *, whole: bool = False) -> list[str]:
    """Raises where a file is missing or is not what checksums.json says; whole: every file that it lists.

    Returns:
        The names that it lists.
    """
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is no checkpoint: {', '.join(missing)} missing")
    sums: Any = {}
    if (folder / CHECKSUMS).is_file():
        try:
            sums = json.loads((folder / CHECKSUMS).read_text())
        except ValueError as error:
            raise CheckpointError(f"{folder / CHECKSUMS} is truncated or altered: {error}") from error
    if not isinstance(sums, dict):
        raise CheckpointError(f"{folder / CHECKSUMS} is truncated or altered: it holds no SHA-256 by file name")
    for name in sums if whole else [name for name in needed if name in sums]:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is no whole checkpoint: {name} missing")
        if _sha256(folder / name) != sums[name]:
            raise CheckpointError(f"{folder / name} is truncated or altered: {CHECKSUMS} has another SHA-256 of it")
    return [*sums]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _described(folder: Path) -> tuple[Config, dict[str, Any]]:
    config = Config.model_validate_json((folder / "config.json").read_text())
    return config, json.loads((folder / "checkpoint.json").read_text())


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (KeyError, RuntimeError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{folder} is no usable checkpoint: {error}") from error
