"""The model that is served: loaded from a checkpoint folder, and changed over when the registry's alias moves."""

import copy
import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster import registry
from dml import checkpoint, evaluate
from dml.data import images
from serve import access, batch_size
from serve.calibration import Calibration
from serve.calibrations import Calibrations

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
Key = TypeVar("Key")
MOST_ON_CPU, MOST_ON_GPU = 64, 256
"""Images of one forward pass at most."""
UNREACHABLE = "the model registry cannot be reached"


class Embedder(Protocol):
    """What the API needs of a model; decoding and embedding are apart so that they run in different threads.

    Attributes:
        name: what the API calls it.
        version: what the API adds to the name.
        alias: of the registry, by which it was found; None for a version or a folder.
        dim: D.
        image_size: height and width that images are resized to, in pixels.
        created: when its weights were written, in seconds since 1970.
        batch: images of one forward pass.
        calibration: its operating points, if it has any.
        metrics: how it did on test classes, e.g. test/recall@1; empty when it was not tested.
    """

    name: str
    version: str
    alias: str | None
    dim: int
    image_size: int
    created: int
    batch: int
    calibration: Calibration | None
    metrics: dict[str, float]

    def decode(self, data: bytes) -> Tensor:
        """An image file as the float32 (channels, S, S) that `embed` takes; raises ImageError when it is none."""

    def embed(self, inputs: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Decoded images -> embeddings (B, D) of unit norm."""


def label(model: Embedder) -> str:
    """Name and version as every answer carries them: onethreshold@3."""
    return f"{model.name}@{model.version}"


@dataclass(frozen=True)
class Execution:
    """How models are run.

    Attributes:
        device: where.
        batch: images of one forward pass; None to measure it when a model is loaded.
        compiled: by torch.compile, which takes a minute or more whenever a model is loaded.
    """

    device: torch.device = CPU
    batch: int | None = None
    compiled: bool = False


class CheckpointEmbedder:
    """An encoder from a checkpoint folder.

    Args:
        folder: written by `dml.checkpoint.save`.
        name: what the API calls it.
        version: what the API adds to the name.
        execution: how it is run.
        alias: of the registry, by which it was found.

    Raises:
        CheckpointError: the folder is no usable checkpoint.
    """

    def __init__(
        self, folder: Path, name: str, version: str, execution: Execution | None = None, alias: str | None = None
    ) -> None:
        execution = execution or Execution()
        loaded = checkpoint.load(folder)
        self.name = name
        self.version = version
        self.alias = alias
        self.dim = loaded.config.encoder.dim
        self.image_size = loaded.config.data.image_size
        self.calibration = Calibrations.beside(folder).current()
        self.metrics = _metrics(folder / registry.EVALUATION)
        self.created = int((folder / "encoder.safetensors").stat().st_mtime)
        self._config = loaded.config
        self._device = execution.device
        # As the images lie; oneDNN then rearranges less of the weights at each pass.
        encoder = loaded.encoder.to(self._device).to(memory_format=torch.channels_last)
        self._encoder = torch.compile(encoder, dynamic=True) if execution.compiled else encoder
        self.batch = execution.batch or self._measured()

    def decode(self, data: bytes) -> Tensor:
        """An image file as the uint8 (channels, S, S) that `embed` takes; raises ImageError when it is none."""
        transform = images.Transform(self._config.data)
        pixels = images.decode(data, self._config.data.channels, enough=transform.enough)
        return transform([pixels], np.zeros(1, np.int64))[0]

    def embed(self, inputs: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Decoded images -> embeddings (B, D) of unit norm."""
        with torch.inference_mode(), evaluate.autocast(self._config, self._device):
            parts = []
            for start in range(0, len(inputs), self.batch):
                pixels = self._stacked(inputs[start : start + self.batch]).to(self._device, non_blocking=True)
                parts.append(self._encoder(images.normalise(pixels, self._config.data)).float())
            return torch.cat(parts).cpu().numpy()

    def _stacked(self, inputs: Sequence[Tensor]) -> Tensor:
        pinned = self._device.type == "cuda"
        batch = torch.empty(
            (len(inputs), *inputs[0].shape),
            dtype=inputs[0].dtype,
            memory_format=torch.channels_last,  # as they were decoded, and as convolutions are faster
            pin_memory=pinned,
        )
        for row, image in zip(batch, inputs, strict=True):
            row.copy_(image)
        return batch

    def _measured(self) -> int:
        blank = torch.zeros(images.Transform(self._config.data).shape, dtype=torch.uint8)
        self.batch = most = MOST_ON_GPU if self._device.type == "cuda" else MOST_ON_CPU
        rates = batch_size.measure(lambda size: self.embed([blank] * size), most=most)
        chosen = batch_size.choose(rates)
        curve = ", ".join(f"{size}: {rate:.4g}" for size, rate in rates.items())
        log.warning("%s: batches of %d; images/s by batch on %s: %s", label(self), chosen, self._device, curve)
        return chosen


class Source(Protocol):
    """Where the API finds the model at each request."""

    @property
    def current(self) -> Embedder | None:
        """The model to use now; None until there is one."""

    @property
    def trouble(self) -> str | None:
        """Why there is none, or what is wrong although there is one, for the client; None when all is well."""

    def start(self) -> None:
        """Begins to look for a model, without waiting for it."""

    def stop(self) -> None:
        """Ends the search; what is loaded stays."""


class Follower(Generic[Key]):
    """Looks every few seconds, in a thread, which model is wanted, and changes over to it in one assignment.

    A registry that is down and a model that does not load are logged and change nothing for the model that is served.

    Args:
        find: says which model is wanted; None when there is none yet.
        load: loads it.
        poll: seconds between two looks.
        recall: says which model was wanted the last time, for a start while `find` or `load` fails.
        calibrations: of the wanted model; the one in use is looked up before it is served, and at every look.
    """

    def __init__(
        self,
        find: Callable[[], Key | None],
        load: Callable[[Key], Embedder],
        poll: float = 5.0,
        recall: Callable[[], Key | None] = lambda: None,
        calibrations: Callable[[Key], Calibrations] | None = None,
    ) -> None:
        self._find = find
        self._load = load
        self._recall = recall
        self._calibrations = calibrations
        self._poll = poll
        self._held: tuple[Key, Embedder] | None = None
        self._cached = False
        self._trouble: str | None = "the first look for it is not over"
        self._logged: dict[str, str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-champion", daemon=True)

    @property
    def current(self) -> Embedder | None:
        """The model to use now; None until there is one."""
        return self._held[1] if self._held else None

    @property
    def trouble(self) -> str | None:
        """Why there is none, or what is wrong although there is one, for the client; None when all is well."""
        if self._trouble and self._cached:
            return f"{self._trouble}; what is served comes from the cache of the last time"
        return self._trouble

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Asks the thread to end; it is not waited for, since a registry that is down can hold it for minutes."""
        self._stopping.set()

    def look(self) -> None:
        """One look: loads the wanted model when it is another than the one held, and takes its calibration up."""
        try:
            wanted = self._find()
        except Exception as error:  # whatever a store, a proxy or the network raises
            self._report(UNREACHABLE, error)
        else:
            if wanted is not None and (self._held is None or self._held[0] != wanted):
                self._change(wanted)
            else:
                self._trouble, self._cached = None, False
                if wanted is not None:
                    self._recalibrate()
        if self._held is None and self._trouble is not None:
            self._fall_back()

    def _change(self, wanted: Key) -> None:
        self._trouble = "it is being loaded"
        try:
            # First what decides: the thresholds that it was registered with may not be those in use.
            calibrations = self._calibrations(wanted) if self._calibrations else None
            calibration = calibrations.current() if calibrations else None
            model = self._load(wanted)
        except Exception as error:  # a broken upload must not take down what is served
            self._report(f"the wanted model cannot be loaded ({wanted})", error, shown="it cannot be loaded")
            return
        if calibrations:
            model.calibration = calibration
        self._trouble, self._cached = None, False
        self._logged.clear()
        self._serve(wanted, model)

    def _fall_back(self) -> None:
        """Serves what was wanted the last time; the trouble with what is wanted now stays."""
        try:
            last = self._recall()
            if last is None:
                return
            model = self._load(last)
        except Exception as error:
            self._report("what was served the last time cannot be loaded", error, shown=self._trouble)
            return
        self._cached = True
        self._serve(last, model)

    def _serve(self, key: Key, model: Embedder) -> None:
        before = self.current
        self._held = key, model
        origin = ", from the cache" if self._cached else ""
        log.warning("serving %s (D = %d, %d px)%s", label(model), model.dim, model.image_size, origin)
        if before is not None:
            access.count_model(label(before), served=False)
        access.count_model(label(model), served=True)

    def _recalibrate(self) -> None:
        if self._calibrations is None or self._held is None:
            return
        key, model = self._held
        try:
            calibration = self._calibrations(key).current()
        except Exception as error:  # as for the model: what decides goes on deciding
            self._report("the calibration in use cannot be read", error)
            return
        if calibration != model.calibration:
            # A copy, so that a request under way is decided and labelled by one calibration.
            changed = copy.copy(model)
            changed.calibration = calibration
            self._held = key, changed
            log.warning("%s is decided by calibration %s now", label(model), calibration.id if calibration else "none")

    def _follow(self) -> None:
        self.look()
        while not self._stopping.wait(self._poll):
            self.look()

    def _report(self, what: str, error: Exception, shown: str | None = None) -> None:
        self._trouble = shown or what
        line = f"{what}: {type(error).__name__}: {error}"
        if self._logged.get(what) != line:  # once, not every few seconds
            log.warning("%s; what is loaded goes on serving", line)
            self._logged[what] = line


def source(model: str, poll: float = 5.0, execution: Execution | None = None) -> Follower[Any]:
    """What follows a registered model (models:/NAME@ALIAS, models:/NAME/VERSION) or holds a checkpoint folder."""
    if not model.startswith("models:"):
        load_folder = partial(_load_folder, execution=execution)
        return Follower(lambda: Path(model), load_folder, poll, calibrations=Calibrations.beside)
    load = partial(_load_version, uri=model, execution=execution)
    return Follower(partial(registry.find, model), load, poll, partial(registry.recall, model), Calibrations.of_version)


def check(model: str) -> None:
    """Refuses, before anything is started, a model that can never be served.

    Raises:
        ValueError: a models: URI of another form, or a folder that is no usable checkpoint.
    """
    if model.startswith("models:"):
        registry.parse(model)
    else:
        checkpoint.load(model)


def _load_version(version: registry.ModelVersion, uri: str, execution: Execution | None) -> Embedder:
    alias = registry.parse(uri)[1]
    made = CheckpointEmbedder(registry.download(version), version.name, str(version.version), execution, alias)
    registry.remember(uri, version)
    return made


def _load_folder(folder: Path, execution: Execution | None) -> Embedder:
    return CheckpointEmbedder(folder, registry.NAME, folder.resolve().name, execution)


def _metrics(evaluation: Path) -> dict[str, float]:
    """The figures of an evaluation.json; empty when there is none."""
    if not evaluation.is_file():
        return {}
    found = json.loads(evaluation.read_text()).get("metrics") or {}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
