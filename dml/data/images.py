"""From an image file to the tensor that the encoder sees: decoding, the evaluation transform, augmentation."""

import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from dml import draws
from dml.config import DataConfig

# Raster formats only: Pillow would hand others (EPS) to an outside program.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")

Images = Tensor | Sequence[Tensor]
"""One uint8 batch (B, c, H, W), or a sequence of uint8 images (c, H, W) of any sizes."""

_AUGMENT_STREAM = 0x617567  # keeps these draws apart from the samplers' with the same seed and epoch
_SHIFT, _DEGREES, _SCALE = 0.06, 8.0, 0.10
_CROP_AREA, _CROP_RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
_RESIZE = 256 / 224  # shorter side before the centre crop, relative to the crop


class ImageError(ValueError):
    """Bytes that are no readable image; the message is the reason."""


def probe(source: Path | bytes, *, max_pixels: int | None = None) -> tuple[int, int]:
    """Width and height in pixels, from the header alone.

    Raises:
        ImageError: no image, an unknown format, or more than max_pixels.
    """
    with _opened(source, max_pixels) as image:
        return image.size


def decode(source: Path | bytes, channels: int, *, max_pixels: int | None = None) -> Tensor:
    """An image of any mode as uint8 (channels, H, W); channels is 1 (grayscale) or 3 (RGB).

    The EXIF orientation is applied, transparency is laid on white, 16-bit grayscale is scaled to 8 bits, and of an
    animation the first frame is taken. max_pixels (width x height) is checked before any pixel is decoded.

    Raises:
        ImageError: no image, an unknown format, a truncated file, or more than max_pixels.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    with _opened(source, max_pixels) as image:
        try:
            flat = _flatten(ImageOps.exif_transpose(image)).convert(mode)
            pixels = np.array(flat, dtype=np.uint8)
        except Exception as error:  # a decoder that meets broken data may raise anything
            raise ImageError(f"not decodable: {_reason(error)}") from error
    return torch.from_numpy(pixels.reshape(flat.height, flat.width, channels)).permute(2, 0, 1).contiguous()


def to_input(images: Images, config: DataConfig) -> Tensor:
    """The evaluation transform: uint8 images to float32 (B, channels, S, S), normalised.

    With augment "crop" (photographs) the shorter side is resized to S * 256 / 224 and the centre is cropped; otherwise
    images are resized to S x S whatever their shape. A batch that is already S x S is only normalised, except for
    "crop", which sees every image alike.
    """
    size = config.image_size
    if config.augment == "crop":
        return _normalise(torch.stack([_centre_crop(image, size) for image in images]).float(), config)
    return _normalise(_fitted(images, size).float(), config)


def augment(
    images: Images, config: DataConfig, *, seed: int, epoch: int, indices: npt.NDArray[np.int64] | Sequence[int]
) -> Tensor:
    """The training transform: uint8 images to float32 (B, channels, S, S), normalised.

    indices (B,) are the samples' positions in their split: every draw is keyed by (seed, epoch, index), so that a
    sample is changed in the same way in whatever batch, rank or thread it turns up.
    """
    if config.augment == "none":
        return to_input(images, config)
    key = (_AUGMENT_STREAM, seed, epoch)
    if config.augment == "affine":
        draws_B4 = draws.uniform(*key, rows=indices, count=4)
        return _normalise(_affine(_fitted(images, config.image_size).float(), draws_B4), config)
    draws_B5 = draws.uniform(*key, rows=indices, count=5)
    crops = [_random_crop(image, config.image_size, row) for image, row in zip(images, draws_B5, strict=True)]
    return _normalise(torch.stack(crops).float(), config)


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


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _eight_bits(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    floats = np.nan_to_num(values.astype(np.float64))
    if np.issubdtype(values.dtype, np.floating):
        scale = 255.0 if floats.max() <= 1.0 else 1.0
    else:
        # Pillow opens 16-bit files in a 32-bit mode too, where only the values tell the depth.
        scale = 1 / 257 if values.dtype.itemsize == 2 or floats.max() > 255 else 1.0
    return np.clip(np.rint(floats * scale), 0, 255).astype(np.uint8)


def _normalise(pixels: Tensor, config: DataConfig) -> Tensor:
    scale = 1 / (255 * config.std)
    return pixels.mul_(scale).sub_(config.mean / config.std)


def _fitted(images: Images, size: int) -> Tensor:
    if isinstance(images, Tensor):
        return resize(images, size, size)
    return torch.cat([resize(image[None], size, size) for image in images])


def _centre_crop(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[-2:]
    scale = round(size * _RESIZE) / min(height, width)
    resized = resize(image[None], max(size, round(height * scale)), max(size, round(width * scale)))[0]
    top, left = (resized.shape[-2] - size) // 2, (resized.shape[-1] - size) // 2
    return resized[:, top : top + size, left : left + size]


def _random_crop(image: Tensor, size: int, draws_5: npt.NDArray[np.float64]) -> Tensor:
    height, width = image.shape[-2:]
    area, ratio, across, down, flip = draws_5.tolist()
    pixels = height * width * (_CROP_AREA[0] + area * (_CROP_AREA[1] - _CROP_AREA[0]))
    shape = math.exp(math.log(_CROP_RATIO[0]) + ratio * math.log(_CROP_RATIO[1] / _CROP_RATIO[0]))
    crop_height = min(height, max(1, round(math.sqrt(pixels / shape))))
    crop_width = min(width, max(1, round(math.sqrt(pixels * shape))))
    top, left = int(down * (height - crop_height + 1)), int(across * (width - crop_width + 1))
    crop = image[:, top : top + crop_height, left : left + crop_width]
    out = resize(crop[None].contiguous(), size, size)[0]
    return out.flip(-1) if flip < 0.5 else out


def _affine(pixels: Tensor, draws_B4: npt.NDArray[np.float64]) -> Tensor:
    signed = 2 * torch.from_numpy(draws_B4).float() - 1
    # grid_sample's coordinates run from -1 to 1, so a shift by a share of the side is twice that share.
    across, down = 2 * _SHIFT * signed[:, 0], 2 * _SHIFT * signed[:, 1]
    angle, scale = math.radians(_DEGREES) * signed[:, 2], (1 + _SCALE) ** signed[:, 3]
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, across, sin, cos, down], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
