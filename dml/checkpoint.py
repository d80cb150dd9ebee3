"""Checkpoints: weights and config in one folder, safetensors and JSON, never pickle.

    folder/encoder.safetensors   the encoder's weights
    folder/loss.safetensors      the loss's own parameters (proxies), when it has any
    folder/memory.safetensors    the cross-batch memory, when there is one
    folder/plan.safetensors      the batches that an embedding-driven sampler planned, when there are any
    folder/config.json           the Config that made them
    folder/checkpoint.json       epoch, step, metrics and whatever else the writer adds

This is the only on-disk format. A folder is complete or absent: it is written beside its place and moved there at once.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import nn

from dml import encoders
from dml.config import Config

FILES = ("encoder.safetensors", "config.json", "checkpoint.json")


class CheckpointError(ValueError):
    """A folder that is no complete checkpoint; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        encoder: in eval mode, on the CPU; float32 (B, channels, S, S) -> (B, D) of unit norm.
        config: the Config that it was trained with.
        info: epoch, step and val metrics, as the writer gave them.
        plan: int64 (steps, B), the stored plan of an embedding-driven sampler; None where there is none.
    """

    encoder: encoders.Encoder
    config: Config
    info: dict[str, Any]
    plan: npt.NDArray[np.int64] | None = None


def save(
    folder: Path,
    encoder: nn.Module,
    config: Config,
    *,
    info: Mapping[str, Any],
    loss: nn.Module | None = None,
    memory: nn.Module | None = None,
    plan: npt.NDArray[np.int64] | None = None,
) -> None:
    """Writes a checkpoint folder; an existing one of the same name is replaced only when the new one is complete.

    Args:
        folder: where.
        encoder: the encoder that config describes.
        config: how it was made.
        info: epoch, step and metrics; anything that JSON holds.
        loss: the loss, for its own parameters.
        memory: the cross-batch memory (`EpochReport.memory`).
        plan: int64 (steps, B), the stored plan of an embedding-driven sampler (`EpochReport.plan`).

    Raises:
        CheckpointError: a weight is NaN or infinite (nothing is written).
    """
    from safetensors.torch import save_file

    parts = {"encoder": encoder, "loss": loss, "memory": memory}
    states = {part: module.state_dict() for part, module in parts.items() if module is not None}
    if plan is not None:
        states["plan"] = {"plan": torch.from_numpy(plan)}
    for part, state in states.items():
        for key, value in state.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise CheckpointError(f"{part} weight {key} is not finite; the checkpoint {folder} is not written")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        whole = Path(scratch) / "checkpoint"
        whole.mkdir()
        for part, state in states.items():
            if state:
                tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
                save_file(tensors, whole / f"{part}.safetensors")
        (whole / "config.json").write_text(config.model_dump_json(indent=2))
        (whole / "checkpoint.json").write_text(json.dumps(dict(info), indent=2))
        if folder.exists():
            shutil.move(folder, Path(scratch) / "replaced")
        whole.rename(folder)


def load(folder: Path | str) -> Checkpoint:
    """Reads a checkpoint folder; nothing that the config names is imported or downloaded.

    Raises:
        CheckpointError: a file is missing, truncated, or does not fit the others.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is no checkpoint: {', '.join(missing)} missing")
    try:
        config = Config.model_validate_json((folder / "config.json").read_text())
        info = json.loads((folder / "checkpoint.json").read_text())
        bare = config.encoder.model_copy(update={"pretrained": False, "weights": None})
        encoder = encoders.build(bare, channels=config.data.channels, image_size=config.data.image_size)
        encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
        plan_file = folder / "plan.safetensors"
        plan = load_file(plan_file)["plan"].numpy() if plan_file.is_file() else None
    except (
        KeyError,
        RuntimeError,
        SafetensorError,
        UnicodeDecodeError,
        ValidationError,
        json.JSONDecodeError,
    ) as error:
        raise CheckpointError(f"{folder} is no usable checkpoint: {error}") from error
    return Checkpoint(encoder.eval(), config, info, plan)
