"""From an image file to the tensor that the encoder sees: decoding, the evaluation transform, augmentation."""

import functools
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from dml import draws
from dml.config import DataConfig

# Raster formats only: Pillow would hand others (EPS) to an outside program. No ICO: it is decoded as it is opened.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")

Images = Tensor | Iterable[Tensor]
"""One uint8 batch (B, c, H, W), or uint8 images (c, H, W) of any sizes, gone through once."""

_AUGMENT_STREAM = 0x617567  # keeps these draws apart from the samplers' with the same seed and epoch
_SHIFT, _DEGREES, _SCALE = 0.06, 8.0, 0.10
_CROP_AREA, _CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
_RESIZE = 256 / 224  # shorter side before the centre crop, relative to the crop
_ORIENTATION = 0x0112  # EXIF
_MOST_PIXELS = 2**26  # of a JPEG; what is larger is left to Pillow, which refuses what would fill the memory
_MOST_SCANS = 100  # of a progressive JPEG: encoders write ten, and each goes through all pixels
_NEAREST = [round(value / 257) for value in range(2**16)]  # 8 bits of each 16


class ImageError(ValueError):
    """Bytes that are no readable image; the message is the reason."""


@dataclass(frozen=True)
class Transform:
    """What an image goes through on its way to the encoder, up to `normalise`: augmented in training, else fitted.

    Attributes:
        config: size, channels and augmentation.
        training: (seed, epoch) of the augmentation; None for the evaluation transform.
    """

    config: DataConfig
    training: tuple[int, int] | None = None

    def __call__(self, images: Images, indices: npt.NDArray[np.int64]) -> Tensor:
        """uint8 images, at positions (B,) of their split -> (B, channels, S, S) in [0, 255], of self.dtype."""
        config = self.config
        if self.training is None or config.augment == "none":
            return _fit(images, config)
        seed, epoch = self.training
        key = (_AUGMENT_STREAM, seed, epoch)
        if config.augment == "affine":
            return _affine(_fitted(images, config.image_size).float(), draws.uniform(*key, rows=indices, count=4))
        draws_B5 = draws.uniform(*key, rows=indices, count=5)
        return _batch(
            [_random_crop(image, config.image_size, row) for image, row in zip(images, draws_B5, strict=True)]
        )

    @property
    def dtype(self) -> torch.dtype:
        """uint8, which travels to a GPU in a quarter of the time; float32 where pixels are interpolated at places."""
        return torch.uint8 if self.training is None or self.config.augment != "affine" else torch.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, S, S)."""
        return self.config.channels, self.config.image_size, self.config.image_size

    @property
    def enough(self) -> int:
        """Pixels of an image's shorter side, beyond which more make no difference that matters: twice what is shown."""
        size = self.config.image_size
        if self.config.augment == "crop":
            # A random crop's shorter side is at least this share of the image's.
            least = math.sqrt(_CROP_AREA[0] * _CROP_RATIO[0])
            return math.ceil(2 * size * _RESIZE) if self.training is None else math.ceil(2 * size / least)
        return 2 * size


def probe(source: Path | bytes, *, max_pixels: int | None = None) -> tuple[int, int]:
    """Width and height in pixels, from the header alone.

    Raises:
        ImageError: no image, an unknown format, or more than max_pixels.
    """
    with _opened(source, max_pixels) as image:
        return image.size


def media_type(source: Path | bytes) -> str:
    """The media type of an image file, e.g. image/png, from its header.

    Raises:
        ImageError: no image, or an unknown format.
    """
    with _opened(source, None) as image:
        return Image.MIME.get(image.format or "", "application/octet-stream")


def decode(source: Path | bytes, channels: int, *, max_pixels: int | None = None, enough: int | None = None) -> Tensor:
    """An image of any mode as uint8 (channels, H, W); channels is 1 (grayscale) or 3 (RGB).

    The EXIF orientation is applied, transparency is laid on white, 16-bit grayscale is scaled to 8 bits, and of an
    animation the first frame is taken. max_pixels (width x height) is checked before any pixel is decoded.

    A JPEG that is at least twice as large as needed, with `enough` pixels on its shorter side, is decoded at a smaller
    size, from its coefficients of low frequency alone.

    Raises:
        ImageError: no image, an unknown format, a truncated file, more than max_pixels, or a JPEG of too many scans.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise ImageError(_reason(error)) from error
    _check_scans(data)
    pixels = _decode_jpeg(data, channels, max_pixels or _MOST_PIXELS, enough)
    if pixels is not None:
        return pixels
    with _opened(data, max_pixels) as image:
        mode = {1: "L", 3: "RGB"}[channels]
        try:
            flat = _flatten(ImageOps.exif_transpose(image)).convert(mode)
            rows = np.array(flat, dtype=np.uint8)
        except Exception as error:  # a decoder that meets broken data may raise anything
            raise ImageError(f"not decodable: {_reason(error)}") from error
    return _channels_first(rows.reshape(flat.height, flat.width, channels))


def to_input(images: Images, config: DataConfig) -> Tensor:
    """The evaluation transform: uint8 images to float32 (B, channels, S, S), normalised.

    With augment "crop" (photographs) the shorter side is resized to S * 256 / 224 and the centre is cropped; otherwise
    images are resized to S x S whatever their shape. A batch that is already S x S is only normalised, except for
    "crop", which sees every image alike.
    """
    return normalise(_fit(images, config), config)


def augment(
    images: Images, config: DataConfig, *, seed: int, epoch: int, indices: npt.NDArray[np.int64] | Sequence[int]
) -> Tensor:
    """The training transform: uint8 images to float32 (B, channels, S, S), normalised.

    indices (B,) are the samples' positions in their split: every draw is keyed by (seed, epoch, index), so that a
    sample is changed in the same way in whatever batch, rank or thread it turns up.
    """
    return normalise(Transform(config, (seed, epoch))(images, np.asarray(indices, dtype=np.int64)), config)


def normalise(pixels: Tensor, config: DataConfig) -> Tensor:
    """Pixels in [0, 255], uint8 or float32, on any device -> float32 of the same shape, less the mean, over the std."""
    return torch.mul(pixels, 1 / (255 * config.std)).sub_(config.mean / config.std)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 (B, c, H, W) resized to (B, c, height, width), bilinear with anti-aliasing."""
    if images.shape[-2:] == (height, width):
        return images
    return functional.interpolate(images, size=(height, width), mode="bilinear", antialias=True)


def _opened(source: Path | bytes, max_pixels: int | None) -> Image.Image:
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        image = Image.open(stream, formats=_known())
    except Exception as error:  # as in decode
        raise ImageError(_reason(error)) from error
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        image.close()
        raise ImageError(f"{width} x {height} pixels; at most {max_pixels:,} are allowed")
    return image


@functools.cache
def _known() -> tuple[str, ...]:
    # Pillow may be built without a format, and reads some (MPO) through another's reader.
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in a known format ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def _check_scans(data: bytes) -> None:
    # What lies within or behind the picture, as a phone's video does, has the marker by chance once in 64 KiB.
    scans, most = data.count(b"\xff\xda"), _MOST_SCANS + len(data) // 2**15
    if scans > most and data.startswith(b"\xff\xd8"):
        raise ImageError(f"a JPEG of {scans:,} scans; at most {most:,} are decoded")


def _decode_jpeg(data: bytes, channels: int, max_pixels: int, enough: int | None) -> Tensor | None:
    """A JPEG, by the fastest decoder that was found (benchmarks/loader.py); None for what is left to Pillow."""
    if not data.startswith(b"\xff\xd8"):
        return None
    smaller = {"min_height": enough, "min_width": enough, "min_factor": 2} if enough is not None else {}
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > max_pixels or colours not in ("YCbCr", "Gray", "RGB"):
            return None
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", **smaller)
        return _upright(_channels_first(pixels), _orientation(data))
    except Exception:  # Pillow knows the reason, or reads what is merely unusual
        return None


def _orientation(data: bytes) -> int:
    """EXIF's, 1 to 8. Pillow is asked only where a segment before the pixels may hold it: opening costs it a while."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place + 1] != 0xDA:  # the marker that pixels follow
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    head = data[:place]
    if b"Exif\0\0" not in head and b"tiff:Orientation" not in head:
        return 1
    with _opened(data, None) as image:
        return int(image.getexif().get(_ORIENTATION, 1))


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """(c, H, W) the right way up, from its EXIF orientation: 5 to 8 are stored with rows and columns changed over."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.mT
    mirrored = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return pixels.flip(mirrored) if mirrored else pixels


def _channels_first(pixels_HWC: npt.NDArray[np.uint8]) -> Tensor:
    # A view: torch resizes pixels that lie side by side faster, and convolves them so.
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        return Image.fromarray(_eight_bits(np.array(image)))
    if image.mode.startswith("I"):
        # Pillow opens 16-bit files in a 32-bit mode too, where only the values tell the depth.
        deep = image.mode != "I" or image.getextrema()[1] > 255  # type: ignore[operator]  # of one band
        return image.convert("I").point(_NEAREST, "L") if deep else image.convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _eight_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """In place: of an image as large as may be, a second copy counts."""
    np.nan_to_num(values, copy=False)
    if values.max() <= 1:
        values *= 255
    return np.clip(np.rint(values, out=values), 0, 255, out=values).astype(np.uint8)


def _fit(images: Images, config: DataConfig) -> Tensor:
    if config.augment == "crop":
        return _batch([_centre_crop(image, config.image_size) for image in images])
    return _fitted(images, config.image_size)


def _fitted(images: Images, size: int) -> Tensor:
    if isinstance(images, Tensor):
        return resize(images, size, size)
    return _batch([resize(_alone(image), size, size) for image in images])


def _batch(images: Sequence[Tensor]) -> Tensor:
    return images[0] if len(images) == 1 else torch.cat(list(images))


def _alone(image: Tensor) -> Tensor:
    """A batch of this image, with strides by which torch knows that its channels come last, if they do."""
    return image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)


def _centre_crop(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[-2:]
    scale = round(size * _RESIZE) / min(height, width)
    resized = resize(_alone(image), max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (resized.shape[-2] - size) // 2, (resized.shape[-1] - size) // 2
    return resized[..., top : top + size, left : left + size]


def _random_crop(image: Tensor, size: int, draws_5: npt.NDArray[np.float64]) -> Tensor:
    height, width = image.shape[-2:]
    area, ratio, across, down, flip = draws_5.tolist()
    pixels = height * width * (_CROP_AREA[0] + area * (_CROP_AREA[1] - _CROP_AREA[0]))
    shape = math.exp(math.log(_CROP_RATIO[0]) + ratio * math.log(_CROP_RATIO[1] / _CROP_RATIO[0]))
    crop_height = min(height, max(1, round(math.sqrt(pixels / shape))))
    crop_width = min(width, max(1, round(math.sqrt(pixels * shape))))
    top, left = int(down * (height - crop_height + 1)), int(across * (width - crop_width + 1))
    crop = resize(_alone(image[:, top : top + crop_height, left : left + crop_width]), size, size)
    return crop.flip(-1) if flip < 0.5 else crop


def _affine(pixels: Tensor, draws_B4: npt.NDArray[np.float64]) -> Tensor:
    signed = 2 * torch.from_numpy(draws_B4).float() - 1
    # grid_sample's coordinates run from -1 to 1, so a shift by a share of the side is twice that share.
    across, down = 2 * _SHIFT * signed[:, 0], 2 * _SHIFT * signed[:, 1]
    angle, scale = math.radians(_DEGREES) * signed[:, 2], (1 + _SCALE) ** signed[:, 3]
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, across, sin, cos, down], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
