"""Odd files become tensors or a reason; transforms follow their documented geometry and their keys."""

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dml.config import DataConfig
from dml.data.images import ImageError, Transform, augment, decode, normalise, probe, resize, to_input


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_rgb_and_grayscale_come_out_as_asked_for() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    data = encoded(Image.fromarray(pixels))
    rgb = decode(data, 3)
    assert rgb.dtype == torch.uint8
    assert rgb.tolist() == pixels.transpose(2, 0, 1).tolist()
    gray = decode(data, 1)
    assert gray.shape == (1, 2, 3)
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    assert np.abs(gray[0].numpy() - luma).max() <= 1
    assert decode(encoded(Image.fromarray(pixels[..., 0])), 3)[0].tolist() == pixels[..., 0].tolist()


def test_16_bit_grayscale_keeps_its_range() -> None:
    values = np.array([[0, 257, 32_896, 65_535]], dtype=np.uint16)
    assert decode(encoded(Image.fromarray(values)), 1).tolist() == [[[0, 1, 128, 255]]]
    assert decode(encoded(Image.fromarray(values), "TIFF"), 3)[2].tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize(
    ("kind", "mode", "order"),
    [("PNG", "I;16", "<u2"), ("TIFF", "I;16", "<u2"), ("TIFF", "I;16B", ">u2"), ("PPM", "I", "i4")],
)
def test_every_16_bit_value_becomes_the_nearest_of_8_bits(kind: str, mode: str, order: str) -> None:
    values = np.arange(65_536)
    data = encoded(Image.frombytes(mode, (256, 256), values.astype(order).tobytes()), kind)
    assert np.array_equal(decode(data, 1).flatten(), np.rint(values / 257))


def test_32_bit_integers_within_8_bits_stay_as_they_are() -> None:
    data = encoded(Image.fromarray(np.array([[-5, 0, 99, 255]], np.int32)), "TIFF")
    assert decode(data, 1).tolist() == [[[0, 0, 99, 255]]]


def test_float_images_are_taken_as_shares_or_as_bytes() -> None:
    assert decode(encoded(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "TIFF"), 1).tolist() == [
        [[0, 128, 255]]
    ]
    assert decode(encoded(Image.fromarray(np.array([[0, 99, 300]], np.float32)), "TIFF"), 1).tolist() == [
        [[0, 99, 255]]
    ]


def test_cmyk_jpeg_is_read_as_its_colours() -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    channels = decode(encoded(red, "JPEG", quality=95), 3).float().mean((1, 2))
    assert channels[0] > 230
    assert channels[1:].max() < 25


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """Colours that change smoothly and within gamut, with fine detail on top; sides that are no multiples of 8."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(60, 196, (7, 9, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((604, 404), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray(np.clip(pixels + generator.normal(0, 4, (404, 604, 1)), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("options", [{"quality": 75}, {"quality": 95, "subsampling": 0}, {"progressive": True}])
def test_jpegs_decode_as_pillow_decodes_them(photograph: Image.Image, options: dict[str, object]) -> None:
    data = encoded(photograph, "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)
    assert np.abs(decode(data, 3).permute(1, 2, 0).numpy() - expected).max() <= 1
    luma = expected @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decode(data, 1)[0].numpy() - luma).max() <= 2
    gray = encoded(photograph.convert("L"), "JPEG", **options)
    pixels = np.asarray(Image.open(io.BytesIO(gray)), dtype=np.int16)
    for channels in (1, 3):
        assert np.abs(decode(gray, channels).numpy() - pixels).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_as_pillow_turns_it(
    photograph: Image.Image, orientation: int, kind: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph, kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), dtype=np.int16)
    found = decode(data, 3).permute(1, 2, 0).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1


def test_an_orientation_is_found_behind_other_segments(photograph: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded(photograph, "JPEG", exif=exif)
    # A profile before the EXIF, which holds the marker that the pixels begin with.
    profile = b"\xff\xe2" + (2 + 40).to_bytes(2, "big") + b"\xff\xda" * 20
    assert decode(plain[:2] + profile + plain[2:], 3).shape == (3, 604, 404)


def test_what_lies_behind_a_jpeg_is_not_counted_as_its_scans(photograph: Image.Image) -> None:
    data = encoded(photograph, "JPEG", progressive=True)
    video = np.random.default_rng(0).bytes(10_000_000)  # in which a scan's marker comes by chance
    assert video.count(b"\xff\xda") > 100
    assert torch.equal(decode(data + video, 3), decode(data, 3))


@pytest.mark.parametrize(("enough", "shape"), [(202, (3, 202, 302)), (203, (3, 404, 604)), (100, (3, 101, 151))])
def test_a_jpeg_is_decoded_no_larger_than_needed(
    photograph: Image.Image, enough: int, shape: tuple[int, int, int]
) -> None:
    data = encoded(photograph, "JPEG", quality=95)
    smaller = decode(data, 3, enough=enough)
    assert tuple(smaller.shape) == shape
    exact = resize(decode(data, 3)[None], *shape[1:])[0]
    assert float((smaller.float() - exact.float()).abs().mean()) < 1.5
    assert decode(encoded(photograph), 3, enough=enough).shape == (3, 404, 604), "other formats have one size"


@pytest.mark.parametrize("training", [None, (0, 0)], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", ["affine", "crop", "none"])
def test_enough_pixels_are_as_good_as_all(photograph: Image.Image, kind: str, training: tuple[int, int] | None) -> None:
    config = DataConfig.model_validate({"augment": kind, "image_size": 32, "channels": 3, "mean": 0.0, "std": 1 / 255})
    transform = Transform(config, training)
    data = encoded(photograph, "JPEG", quality=95)
    few = decode(data, 3, enough=transform.enough)
    assert few.shape[-2] >= transform.enough
    assert few.shape[-1] <= 604 / 2
    indices = np.arange(20)
    shown, exact = (transform([image] * 20, indices).float() for image in (few, decode(data, 3)))
    assert shown.shape == (20, 3, 32, 32)
    assert float((shown - exact).abs().mean()) < 1


def test_pixels_become_inputs_wherever_they_are_normalised() -> None:
    config = DataConfig(image_size=16, channels=3, augment="crop", mean=0.45, std=0.226)
    images = [torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8) for _ in range(5)]
    transform = Transform(config, (1, 2))
    pixels = transform(images, np.arange(5))
    assert pixels.dtype == transform.dtype == torch.uint8
    assert torch.equal(normalise(pixels, config), augment(images, config, seed=1, epoch=2, indices=range(5)))


def test_transparency_lies_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putdata([0, 1])
    assert decode(encoded(palette, transparency=0), 3).tolist() == [[[255, 200]], [[255, 0]], [[255, 0]]]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert decode(encoded(half), 3).flatten().tolist() == [127, 127, 127]
    clear = Image.new("LA", (1, 1), (0, 0))
    assert decode(encoded(clear), 1).tolist() == [[[255]]]


def test_one_bit_and_animated_images() -> None:
    assert decode(encoded(Image.new("1", (2, 2), 1)), 1).unique().tolist() == [255]
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, 1).unique().tolist() == [10]


def test_the_exif_orientation_is_applied() -> None:
    image = Image.new("L", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    assert decode(encoded(image, exif=exif), 1).shape == (1, 4, 2)


def test_files_and_bytes_give_the_same(tmp_path: Path) -> None:
    data = encoded(Image.effect_noise((9, 7), 50))
    (tmp_path / "noise.png").write_bytes(data)
    assert torch.equal(decode(tmp_path / "noise.png", 3), decode(data, 3))
    assert probe(tmp_path / "noise.png") == probe(data) == (9, 7)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image in a known format"),
        (b"just text, whatever its name says", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (encoded(Image.effect_noise((64, 64), 50))[:900], "truncated"),
        (encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:900], "truncated"),
        (bomb(60_000, 60_000), "exceeds limit"),
    ],
    ids=["zero bytes", "text", "postscript", "truncated png", "truncated jpeg", "bomb"],
)
def test_what_is_no_image_is_refused_with_the_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(data, 3)
    file = tmp_path / "named.jpg"
    file.write_bytes(data)
    with pytest.raises(ImageError, match=reason):
        decode(file, 3)


def test_a_missing_file_is_an_image_error_too(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        decode(tmp_path / "gone.png", 3)


def test_the_header_is_enough_to_refuse_too_many_pixels() -> None:
    with pytest.raises(ImageError, match=r"5000 x 4000 pixels; at most 1,000,000 are allowed"):
        decode(bomb(5000, 4000), 3, max_pixels=1_000_000)
    with pytest.raises(ImageError, match="at most"):
        probe(bomb(5000, 4000), max_pixels=1_000_000)
    assert decode(encoded(Image.new("L", (10, 10))), 1, max_pixels=100).shape == (1, 10, 10)


def test_inputs_are_normalised() -> None:
    config = DataConfig(image_size=2, mean=0.25, std=0.5)
    batch = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    expected = [(value / 255 - 0.25) / 0.5 for value in (0, 51, 102, 255)]
    assert to_input(batch, config).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert batch.flatten().tolist() == [0, 51, 102, 255], "the images are left as they were"


def test_photographs_are_resized_by_the_shorter_side_and_cropped_at_the_centre() -> None:
    config = DataConfig(image_size=224, channels=3, augment="crop", mean=0.0, std=1.0)
    wide = torch.zeros(3, 256, 1024, dtype=torch.uint8)
    wide[..., 400:624] = 255  # the centre 224 columns of a picture whose shorter side is 256 already
    assert to_input([wide], config).min() == 1.0
    other = to_input([wide, wide[..., :300], wide.mT], config)
    assert other.shape == (3, 3, 224, 224)
    torch.testing.assert_close(other[2], other[0].mT)


def test_other_images_are_stretched_to_fit() -> None:
    config = DataConfig(image_size=8, mean=0.0, std=1.0)
    left_white = torch.zeros(1, 16, 32, dtype=torch.uint8)
    left_white[..., :16] = 255
    squeezed = to_input([left_white], config)[0, 0]
    assert squeezed[:, :3].min() > 0.99
    assert squeezed[:, 5:].max() < 0.01


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 1, 32, 32), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["affine", "crop", "none"])
def test_augmentation_of_a_sample_does_not_depend_on_its_batch(kind: str, batch: torch.Tensor) -> None:
    config = DataConfig.model_validate({"augment": kind})
    indices = np.arange(100, 112)
    whole = augment(batch, config, seed=1, epoch=2, indices=indices)
    assert whole.shape == (12, 1, 32, 32)
    for position in (0, 5, 11):
        alone = augment(
            batch[position : position + 1], config, seed=1, epoch=2, indices=indices[position : position + 1]
        )
        assert torch.equal(alone[0], whole[position])
    backwards = augment(batch.flip(0), config, seed=1, epoch=2, indices=indices[::-1])
    assert torch.equal(backwards.flip(0), whole)
    as_list = augment(list(batch), config, seed=1, epoch=2, indices=indices)
    assert torch.equal(as_list, whole)


@pytest.mark.parametrize("kind", ["affine", "crop"])
def test_seed_epoch_and_sample_each_change_the_augmentation(kind: str, batch: torch.Tensor) -> None:
    config = DataConfig.model_validate({"augment": kind})
    same = batch[:1]
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    results = {augment(same, config, seed=s, epoch=e, indices=[i]).numpy().tobytes() for s, e, i in keys}
    assert len(results) == 4
    assert torch.equal(
        augment(same, config, seed=0, epoch=0, indices=[0]), augment(same, config, seed=0, epoch=0, indices=[0])
    )


def test_affine_changes_stay_small() -> None:
    """The extremes of shift, turn and scale together bound how far a dot at the corner of the middle can wander."""
    config = DataConfig(image_size=65, mean=0.0, std=1.0)
    dot = torch.zeros(1, 1, 65, 65, dtype=torch.uint8)
    dot[..., 16, 48] = 255  # 16 pixels right of and above the centre
    many = augment(dot.expand(300, -1, -1, -1), config, seed=0, epoch=0, indices=np.arange(300))[:, 0].double()
    mass = many.sum((1, 2))
    axis = torch.arange(65.0, dtype=torch.float64)
    down, across = (many.sum(2) @ axis) / mass, (many.sum(1) @ axis) / mass
    away = torch.hypot(down - 16, across - 48)
    radius, shift = math.hypot(16, 16), math.hypot(0.06, 0.06) * 65 * 1.1
    assert away.max() < shift + radius * (0.1 + math.radians(8) * 1.1) + 1
    assert away.min() < 3
    assert away.std() > 0.5


def test_border_pixels_fill_what_moves_in() -> None:
    config = DataConfig(mean=0.0, std=1.0)
    white = torch.full((20, 1, 32, 32), 255, dtype=torch.uint8)
    assert augment(white, config, seed=0, epoch=0, indices=np.arange(20)).min() > 0.999


def test_random_crops_show_a_part_and_half_of_them_mirrored() -> None:
    config = DataConfig(image_size=16, augment="crop", mean=0.0, std=1.0)
    ramp = torch.arange(0, 240, 4, dtype=torch.uint8).repeat(1, 40, 1)  # brighter to the right
    crops = augment([ramp] * 200, config, seed=0, epoch=0, indices=np.arange(200))
    rises = crops[:, 0, 8, -1] > crops[:, 0, 8, 0]
    assert 70 < int(rises.sum()) < 130
    spread = (crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))) * 255
    assert spread.min() < 110, "small crops"
    assert spread.max() > 200, "and large ones"


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (7, 3)])
def test_tiny_and_thin_photographs_work(shape: tuple[int, int]) -> None:
    config = DataConfig(image_size=16, augment="crop")
    image = torch.zeros(1, *shape, dtype=torch.uint8)
    assert to_input([image], config).shape == (1, 1, 16, 16)
    assert augment([image] * 3, config, seed=0, epoch=0, indices=[0, 1, 2]).shape == (3, 1, 16, 16)
