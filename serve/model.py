"""The model that is served: loaded from a checkpoint folder, and changed over when the registry's alias moves."""

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster import registry
from dml import checkpoint
from dml.data import images
from serve.calibration import Calibration
from serve.calibrations import Calibrations

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
Key = TypeVar("Key")
CHUNK = 32
"""Images of one forward pass: beyond it a CPU gains nothing, and memory grows."""


class Embedder(Protocol):
    """What the API needs of a model; decoding and embedding are apart so that they run in different threads."""

    name: str
    version: str
    dim: int
    image_size: int
    created: int
    calibration: Calibration | None

    def decode(self, data: bytes) -> Tensor:
        """An image file as the float32 (channels, S, S) that `embed` takes; raises ImageError when it is none."""

    def embed(self, inputs: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Decoded images -> embeddings (B, D) of unit norm."""


def label(model: Embedder) -> str:
    """Name and version as every answer carries them: onethreshold@3."""
    return f"{model.name}@{model.version}"


class CheckpointEmbedder:
    """An encoder from a checkpoint folder.

    Args:
        folder: written by `dml.checkpoint.save`.
        name: what the API calls it.
        version: what the API adds to the name.
        device: where it runs.

    Raises:
        CheckpointError: the folder is no usable checkpoint.
    """

    def __init__(self, folder: Path, name: str, version: str, device: torch.device = CPU) -> None:
        loaded = checkpoint.load(folder)
        self.name = name
        self.version = version
        self.dim = loaded.config.encoder.dim
        self.image_size = loaded.config.data.image_size
        self.calibration = Calibrations.beside(folder).current()
        self.created = int((folder / "encoder.safetensors").stat().st_mtime)
        self._data = loaded.config.data
        self._device = device
        self._encoder = loaded.encoder.to(device)

    def decode(self, data: bytes) -> Tensor:
        """An image file as the float32 (channels, S, S) that `embed` takes; raises ImageError when it is none."""
        enough = images.Transform(self._data).enough
        return images.to_input([images.decode(data, self._data.channels, enough=enough)], self._data)[0]

    @torch.inference_mode()
    def embed(self, inputs: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        """Decoded images -> embeddings (B, D) of unit norm."""
        chunks = (torch.stack(list(inputs[start : start + CHUNK])) for start in range(0, len(inputs), CHUNK))
        embeddings_BD = torch.cat([self._encoder(chunk.to(self._device)).float().cpu() for chunk in chunks])
        return embeddings_BD.numpy()


class Source(Protocol):
    """Where the API finds the model at each request."""

    @property
    def current(self) -> Embedder | None:
        """The model to use now; None until there is one."""

    @property
    def trouble(self) -> str | None:
        """Why there is none, in words for the client; None when simply none has been promoted yet."""

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
        calibrations: of the wanted model; what is in use of them is looked up at every look.
    """

    def __init__(
        self,
        find: Callable[[], Key | None],
        load: Callable[[Key], Embedder],
        poll: float = 5.0,
        calibrations: Callable[[Key], Calibrations] | None = None,
    ) -> None:
        self._find = find
        self._load = load
        self._poll = poll
        self._calibrations = calibrations
        self._held: tuple[Key, Embedder] | None = None
        self._trouble: str | None = "the first look for it is not over"
        self._logged = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-champion", daemon=True)

    @property
    def current(self) -> Embedder | None:
        """The model to use now; None until there is one."""
        return self._held[1] if self._held else None

    @property
    def trouble(self) -> str | None:
        """Why there is none, in words for the client; None when simply none has been promoted yet."""
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
            self._report("the model registry cannot be reached", error)
            return
        if wanted is None:
            self._trouble = None
        elif self._held and self._held[0] == wanted:
            self._trouble = None
            self._recalibrate()
        else:
            self._change(wanted)

    def _change(self, wanted: Key) -> None:
        self._trouble = "it is being loaded"
        try:
            model = self._load(wanted)
        except Exception as error:  # a broken upload must not take down what is served
            self._report(f"the wanted model cannot be loaded ({wanted})", error, shown="it cannot be loaded")
            return
        self._held, self._trouble, self._logged = (wanted, model), None, ""
        log.warning("serving %s (D = %d, %d px)", label(model), model.dim, model.image_size)
        self._recalibrate()

    def _recalibrate(self) -> None:
        if self._held is None or self._calibrations is None:
            return
        wanted, model = self._held
        try:
            calibration = self._calibrations(wanted).current()
        except Exception as error:  # as for the model: what decides goes on deciding
            self._report("the calibration in use cannot be read", error)
            return
        if calibration != model.calibration:
            # A copy, so that a request under way is decided and labelled by one calibration.
            changed = copy.copy(model)
            changed.calibration = calibration
            self._held = wanted, changed
            log.warning("%s is decided by calibration %s now", label(model), calibration.id if calibration else "none")

    def _follow(self) -> None:
        self.look()
        while not self._stopping.wait(self._poll):
            self.look()

    def _report(self, what: str, error: Exception, shown: str | None = None) -> None:
        self._trouble = shown or what
        line = f"{what}: {type(error).__name__}: {error}"
        if line != self._logged:  # once, not every few seconds
            log.warning("%s; what is loaded goes on serving", line)
            self._logged = line


def source(model: str, poll: float = 5.0, *, device: torch.device = CPU) -> Source:
    """What follows a registered model (models:/NAME@ALIAS, models:/NAME/VERSION) or holds a checkpoint folder."""
    if model.startswith("models:"):
        load = partial(_load_version, device=device)
        return Follower(partial(registry.find, model), load, poll, Calibrations.of_version)
    return Follower(lambda: Path(model), partial(_load_folder, device=device), poll, Calibrations.beside)


def check(model: str) -> None:
    """Refuses, before anything is started, a model that can never be served.

    Raises:
        ValueError: a models: URI of another form, or a folder that is no usable checkpoint.
    """
    if model.startswith("models:"):
        registry.parse(model)
    else:
        checkpoint.load(model)


def _load_version(version: registry.ModelVersion, device: torch.device) -> Embedder:
    return CheckpointEmbedder(registry.download(version), version.name, str(version.version), device)


def _load_folder(folder: Path, device: torch.device) -> Embedder:
    return CheckpointEmbedder(folder, registry.NAME, folder.resolve().name, device)
