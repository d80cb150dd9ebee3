"""Images, a dummy model for the edges of the API, and tiny real checkpoints."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dml import checkpoint, encoders
from dml.config import Config, DataConfig, EncoderConfig
from dml.data import images
from serve.calibration import Calibration
from serve.model import Embedder


class Held:
    """A source that holds one model, or none."""

    def __init__(self, current: Embedder | None, trouble: str | None = None) -> None:
        self.current, self.trouble = current, trouble

    def start(self) -> None: ...

    def stop(self) -> None: ...


class MeanColour:
    """An embedder with an obvious answer: the mean RGB colour of an image, scaled to unit norm."""

    name, version, alias, dim, image_size, created, batch = "colour", "7", None, 3, 8, 1_700_000_000, 32
    calibration: Calibration | None = None
    metrics: ClassVar[dict[str, float]] = {"test/opis": 0.25}

    def decode(self, data: bytes) -> Tensor:
        return images.to_input([images.decode(data, 3)], DataConfig(image_size=8, mean=0.0, std=1.0))[0]

    def embed(self, inputs: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        return torch.nn.functional.normalize(torch.stack(list(inputs)).mean(dim=(2, 3)), dim=1).numpy()


def png(colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def data_uri(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def offline(folder: Path, files: Sequence[bytes]) -> npt.NDArray[np.float32]:
    """What the encoder says of image files without any server."""
    model = checkpoint.load(folder)
    batch = images.to_input([images.decode(data, 1) for data in files], model.config.data)
    with torch.inference_mode():
        return model.encoder(batch).numpy()


def write_checkpoint(folder: Path, seed: int) -> Path:
    """A checkpoint of an untrained small_cnn, D = 16, whose weights depend on the seed."""
    config = Config(data=DataConfig(image_size=32), encoder=EncoderConfig(dim=16))
    torch.manual_seed(seed)
    checkpoint.save(folder, encoders.build(config.encoder, channels=1, image_size=32), config, info={"epoch": 1})
    return folder
