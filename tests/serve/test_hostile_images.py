"""Broken, hostile and odd image files, sent in every way: the right answer or a refusal in words, never a 5xx."""

import io
import random
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
from fastapi.testclient import TestClient
from PIL import Image, ImageFile, PngImagePlugin, features

from serve import api
from serve.limits import Limits
from tests.serve.pictures import Held, MeanColour, data_uri, png

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
LIMITS = Limits(images=4, image_bytes=300_000, request_bytes=600_000, pixels=100_000, aspect=20)
FORMATS = [
    "PNG",
    "JPEG",
    "GIF",
    "BMP",
    "TIFF",
    "WEBP",
    "PPM",
    "TGA",
    *(["JPEG2000"] if features.check("jpg_2000") else []),
]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(api.build(Held(MeanColour()), LIMITS, threads=2)) as client:
        yield client


def ways(client: TestClient, data: bytes, media: str = "image/png") -> list[Any]:
    """The answers to one file as a data URI, in a form and alone."""
    return [
        client.post("/v1/embeddings", json={"input": data_uri(data, media)}),
        client.post("/v1/embeddings", files=[("input", ("x", data, media))]),
        client.post("/v1/embeddings", content=data, headers={"Content-Type": media}),
    ]


def refused(client: TestClient, data: bytes, **kind: Any) -> str:
    """The one message with which a file is refused, however it was sent."""
    messages = set()
    for answer in ways(client, data, **kind):
        assert 400 <= answer.status_code < 500, answer.text
        assert len(answer.text) < 1000
        messages.add(answer.json()["error"]["message"])
    assert len(messages) == 1
    return messages.pop()


def colour(client: TestClient, data: bytes, **kind: Any) -> list[float]:
    """The embedding of a file, however it was sent."""
    rows = []
    for answer in ways(client, data, **kind):
        assert answer.status_code == 200, answer.text
        rows.append(answer.json()["data"][0]["embedding"])
    assert rows[0] == rows[1] == rows[2]
    return list(rows[0])


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def picture(size: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def header_of(width: int, height: int) -> bytes:
    return chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))


def icon_of(png: bytes) -> bytes:
    """An icon that says it is 8 x 8, and holds that PNG."""
    sizes = len(png).to_bytes(4, "little") + (22).to_bytes(4, "little")
    return b"\0\0\1\0\1\0\x08\x08\0\0\1\0\x20\0" + sizes + png


def rescanned(times: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each goes through all of its pixels."""
    whole = saved(Image.new("L", (300, 300)), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * times + whole[-2:]


def claiming(whole: bytes, size: int, claimed: int) -> bytes:
    """A TIFF that says it is as large."""
    return whole.replace(size.to_bytes(4, "little"), claimed.to_bytes(4, "little"))


BOMBS: dict[str, tuple[bytes, str]] = {
    "png, 2^31 pixels a side": (
        b"\x89PNG\r\n\x1a\n" + header_of(2**31 - 1, 2**31 - 1) + chunk(b"IEND", b""),
        "far more than the 100,000 pixels",
    ),
    "png, a small file of many pixels": (saved(Image.new("L", (3000, 3000)), "PNG"), "3000 x 3000 pixels"),
    "png, text that inflates": (
        b"\x89PNG\r\n\x1a\n"
        + header_of(8, 8)
        + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000), 9))
        + chunk(b"IDAT", zlib.compress(bytes(200)))
        + chunk(b"IEND", b""),
        "Decompressed data too large",
    ),
    "gif, a large screen": (
        b"GIF89a\xff\xff\xff\xff\x80\x00\x00" + b"\0" * 6 + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
        "far more than",
    ),
    "bmp, a large header": (
        b"BM"
        + bytes(12)
        + (40).to_bytes(4, "little")
        + (60000).to_bytes(4, "little") * 2
        + b"\x01\0\x18\0"
        + bytes(24),
        "far more than",
    ),
    "jpeg, 65535 pixels a side": (
        b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff" + b"\x03\x01\x11\0\x02\x11\0\x03\x11\0\xff\xd9",
        "far more than",
    ),
    "jpeg, of 4000 scans": (rescanned(4000), "4,006 scans"),
    "tiff, a large header": (claiming(saved(Image.new("L", (77, 77)), "TIFF"), 77, 8000), "8000 x 8000 pixels"),
    "ppm, a large header": (b"P6 99999 99999 255\n", "far more than"),
    "ico, a large picture inside": (icon_of(saved(Image.new("L", (3000, 3000)), "PNG")), "not an image in a known"),
}


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The decoders that have been called."""
    called: list[str] = []

    def noting(name: str, decoder: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return decoder(*arguments, **options)

        return noted

    monkeypatch.setattr(ImageFile.ImageFile, "load", noting("Pillow", ImageFile.ImageFile.load))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", noting("simplejpeg", simplejpeg.decode_jpeg))
    return called


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_header(client: TestClient, decoders: list[str], name: str) -> None:
    data, why = BOMBS[name]
    tracemalloc.start()
    try:
        message = refused(client, data)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert why in message
    assert decoders == []
    assert most < 10_000_000, "what zlib inflates, Python counts"


@pytest.mark.parametrize("kind", FORMATS)
def test_too_many_pixels_are_refused_in_every_format_before_one_is_decoded(
    client: TestClient, decoders: list[str], kind: str
) -> None:
    assert "400 x 400 pixels" in refused(client, saved(Image.new("L", (400, 400)), kind))
    assert decoders == []
    assert colour(client, saved(Image.new("L", (100, 100), 255), kind)) == pytest.approx(WHITE, abs=0.02)
    assert set(decoders) == {"simplejpeg" if kind == "JPEG" else "Pillow"}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_off_anywhere(client: TestClient, kind: str) -> None:
    whole = saved(picture(), kind)
    places = [0, 1, 2, 4, 8, *random.Random(0).sample(range(8, len(whole)), 12)]
    for place in places:
        for answer in ways(client, whole[:place])[1:]:
            assert answer.status_code < 500, (place, answer.text)
    assert refused(client, whole[: len(whole) // 3] if kind != "GIF" else whole[:20])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_with_flipped_bits(client: TestClient, kind: str) -> None:
    whole = saved(picture(), kind)
    draw = random.Random(1)
    for _ in range(25):
        broken = bytearray(whole)
        for _ in range(draw.choice([1, 3, 30])):
            # The first hundred bytes hold sizes, offsets and flags.
            broken[draw.randrange(min(len(whole), draw.choice([100, len(whole)])))] ^= 1 << draw.randrange(8)
        answer = client.post("/v1/embeddings", content=bytes(broken), headers={"Content-Type": "image/png"})
        assert answer.status_code in (200, 413, 422), answer.text


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "hello")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("nothing but a byte", b"\0"),
        ("text", b"hello " * 100),
        ("html", b"<html><script>alert(1)</script></html>"),
        ("svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>'),
        ("svg with an outside entity", b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg>&e;</svg>'),
        ("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%id) (r) file\nshowpage\n"),
        ("pdf", b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n"),
        ("a zip archive", zipped()),
        ("a pickle", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94."),
        ("a list of files of ImageMagick", b"push graphic-context\nimage over 0,0 0,0 '|id'\npop graphic-context\n"),
        ("an icon of nothing", b"\0\0\1\0\1\0\x08\x08\0\0\1\0\x20\0" + (22).to_bytes(4, "little") * 2 + bytes(30)),
        ("spaces before a picture", b" " * 10 + png()),
        ("a png of no size", b"\x89PNG\r\n\x1a\n" + header_of(0, 0) + chunk(b"IEND", b"")),
        ("a png without pixels", b"\x89PNG\r\n\x1a\n" + header_of(8, 8) + chunk(b"IEND", b"")),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_said_to_be_none(client: TestClient, name: str, data: bytes) -> None:
    assert "unreadable" in refused(client, data), name


def test_nothing_at_all(client: TestClient) -> None:
    assert refused(client, b"") == "input[0] is empty"


def gifs(*colours: str) -> bytes:
    first, *rest = [Image.new("RGB", (9, 9), name) for name in colours]
    return saved(first, "GIF", save_all=True, append_images=rest)


def clear_png() -> bytes:
    return saved(Image.new("RGBA", (9, 9), (0, 0, 255, 0)), "PNG")


def texted_png() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "<script>alert(1)</script>" * 100)
    return saved(Image.new("RGB", (9, 9), "red"), "PNG", pnginfo=text)


RED, WHITE = [1.0, 0.0, 0.0], [3**-0.5] * 3


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: saved(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG"), RED),
        (lambda: saved(Image.fromarray(np.full((9, 9), 65535, np.uint16)), "PNG"), WHITE),
        (lambda: saved(Image.fromarray(np.full((9, 9), 65535, np.uint16)), "TIFF"), WHITE),
        (lambda: saved(Image.fromarray(np.full((9, 9), 1.0, np.float32)), "TIFF"), WHITE),
        (lambda: saved(Image.new("1", (9, 9), 1), "PNG"), WHITE),
        (lambda: saved(Image.new("L", (9, 9), 200), "JPEG"), WHITE),
        (lambda: saved(Image.new("LA", (9, 9), (200, 255)), "PNG"), WHITE),
        (lambda: saved(Image.new("RGB", (9, 9), "red").quantize(2), "PNG"), RED),
        (clear_png, WHITE),
        (lambda: gifs("red", "blue", "lime"), RED),
        (lambda: saved(Image.new("RGB", (9, 9), "red"), "WEBP", save_all=True, lossless=True), RED),
        (lambda: png((255, 0, 0)) + zipped(), RED),
        (lambda: saved(Image.new("RGB", (9, 9), "red"), "GIF") + b"/*';alert(1)//*/", RED),
        (lambda: saved(Image.new("RGB", (9, 9), "red"), "JPEG", exif=b"Exif\0\0broken" * 20), RED),
        (lambda: saved(Image.new("RGB", (9, 9), "red"), "JPEG", comment=b"<?php system('id'); ?>"), RED),
        (texted_png, RED),
        (lambda: saved(Image.new("RGB", (1, 1), "red"), "PNG"), RED),
        (lambda: saved(Image.new("RGB", (20, 1), "red"), "BMP"), RED),
    ],
    ids=[
        "cmyk jpeg", "16-bit png", "16-bit tiff", "float tiff", "1-bit", "grey jpeg", "grey with alpha", "palette",
        "all transparent", "animated gif", "animated webp", "png with a zip behind", "gif with a script behind",
        "broken exif", "php in a comment", "script in a text chunk", "one pixel", "a strip",
    ],
)  # fmt: skip
def test_odd_pictures_are_seen_as_they_are(
    client: TestClient, make: Callable[[], bytes], expected: list[float]
) -> None:
    for media in ("image/png", "image/x-whatever"):
        np.testing.assert_allclose(colour(client, make(), media=media), expected, atol=0.02)


def test_one_bad_file_among_good_ones_is_named(client: TestClient) -> None:
    files = [("input", png()), ("input", png()), ("input", b"text")]
    answer = client.post("/v1/embeddings", files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "input[2]")
