"""Characters as an open-set retrieval problem, rendered from the typefaces that matplotlib ships: no download.

A class is a character as it looks; its samples are that character in different typefaces and styles. The twelve
DejaVu faces decide which characters are in (those that all of them have), the four STIX faces add samples of the
characters they have too.
"""

import hashlib
import logging
import os
import tempfile
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, features
from PIL import __version__ as pillow_version

from dml.config import DataConfig
from dml.data.imageset import Collection, Memory, digest

_log = logging.getLogger(__name__)

DEJAVU = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
)
STIX = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")

_VERSION = 1  # counts changes of this file that change what is rendered or merged; part of the cache's name
_OBJECT_REPLACEMENT = 0xFFFC  # stands for something else and has no shape of its own
_MERGE_SIZE = 32  # classes are decided at one size, so that they do not depend on data.image_size
_MERGE_TOLERANCE = 0.01  # squared difference over the lighter glyph's ink; a breve for a caron is above it
_MERGE_FACES = 7  # of the twelve DejaVu faces: most of them

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Glyphs:
    """Rendered characters."""

    pixels: Pixels
    """(N, S, S), white ink (255) on black (0)."""
    labels_N: npt.NDArray[np.int64]
    codes_C: npt.NDArray[np.int64]
    """Lowest code point of the characters that look like this class."""


def glyphs(config: DataConfig) -> Collection:
    """One class a character, one sample a typeface and style, config.image_size pixels square.

    Characters that look the same in most of the twelve DejaVu faces (Latin A, Greek Alpha, Cyrillic A) are one class,
    named after the lowest code point. Faces that draw a character pixel for pixel alike give one sample, since a
    duplicate would be a nearest neighbour for free; a character that all faces draw alike is left out. Rendered once
    and kept in the folder that ONETHRESHOLD_CACHE names (else ~/.cache/onethreshold).
    """
    made = _cached(config.image_size)
    names = tuple(f"U+{code:04X} {unicodedata.name(chr(code))}" for code in made.codes_C.tolist())
    pixels = torch.from_numpy(made.pixels)[:, None].expand(-1, config.channels, -1, -1)
    return Collection(made.labels_N, names, Memory(pixels), digest(made.pixels.tobytes(), made.labels_N.tobytes()))


def build(size: int) -> Glyphs:
    """Render and merge everything, size x size pixels; takes seconds."""
    codes = characters()
    reference = {face: render(face, codes, _MERGE_SIZE) for face in DEJAVU}
    groups = look_alikes(list(reference.values()))
    rendered = reference if size == _MERGE_SIZE else {face: render(face, codes, size) for face in DEJAVU}
    row_of = {face: {code: row for row, code in enumerate(codes)} for face in DEJAVU}
    for face in STIX:
        known = _coded(face)
        shared = [code for code in codes if code in known]
        rendered[face] = render(face, shared, size)
        row_of[face] = {code: row for row, code in enumerate(shared)}

    images: list[Pixels] = []
    labels: list[int] = []
    kept: list[int] = []
    for group in groups:
        drawn: dict[bytes, Pixels] = {}
        for face, pixels in rendered.items():
            row = next((row_of[face][codes[g]] for g in group if codes[g] in row_of[face]), None)
            if row is not None:
                drawn.setdefault(pixels[row].tobytes(), pixels[row])
        if len(drawn) > 1:
            images += drawn.values()
            labels += [len(kept)] * len(drawn)
            kept.append(codes[group[0]])
    return Glyphs(np.stack(images), np.array(labels, dtype=np.int64), np.array(kept, dtype=np.int64))


def characters() -> list[int]:
    """Code points that all twelve DejaVu faces have, without spaces, control and combining characters, in order."""
    common = set.intersection(*(_coded(face) for face in DEJAVU)) - {_OBJECT_REPLACEMENT}
    return sorted(code for code in common if unicodedata.category(chr(code))[0] not in "CMZ")


def render(face: str, codes: Sequence[int], size: int) -> Pixels:
    """The characters in a face, (len(codes), size, size) uint8: one scale and baseline, centred on the ink.

    Three quarters of the height are above the baseline and an em is as high, so that o and O, comma and apostrophe
    stay different. A glyph that would not fit is drawn at the largest scale at which it does.
    """
    above = round(0.75 * size)
    fonts: dict[int, ImageFont.FreeTypeFont] = {}
    out = np.zeros((len(codes), size, size), dtype=np.uint8)
    for row, code in enumerate(codes):
        for em in range(above, 0, -1):
            if em not in fonts:
                # The basic layout needs no libraqm, which a machine may or may not have.
                fonts[em] = ImageFont.truetype(str(_file(face)), em, layout_engine=ImageFont.Layout.BASIC)
            canvas = Image.new("L", (6 * size, 4 * size))
            ImageDraw.Draw(canvas).text((2 * size, 2 * size), chr(code), fill=255, font=fonts[em], anchor="ls")
            left, top, right, bottom = canvas.getbbox() or (0, 2 * size, 0, 2 * size)
            if right - left <= size and top >= 2 * size - above and bottom <= 3 * size - above:
                start = left - (size - (right - left)) // 2
                out[row] = np.asarray(canvas.crop((start, 2 * size - above, start + size, 3 * size - above)))
                break
    return out


def look_alikes(faces: Sequence[Pixels]) -> list[list[int]]:
    """Groups of rows that look the same, by their bitmaps (M, S, S) in each face; each group ascends.

    Two rows agree in a face if the squared difference of their bitmaps is under 1 % of the lighter one's ink, and
    look the same if they agree in most faces; groups are the connected components.
    """
    total = len(faces[0])
    votes_MM = np.zeros((total, total), dtype=np.uint8)
    for pixels in faces:
        flat = pixels.reshape(total, -1).astype(np.float32) / 255
        dots_MM = flat @ flat.T
        ink_M = np.diagonal(dots_MM).copy()
        squared_MM = ink_M[:, None] + ink_M - 2 * dots_MM
        votes_MM += squared_MM < _MERGE_TOLERANCE * np.minimum(ink_M[:, None], ink_M)
    parent = list(range(total))

    def find(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    for one, other in np.argwhere(np.triu(votes_MM >= _MERGE_FACES, 1)).tolist():
        low, high = sorted((find(one), find(other)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for row in range(total):
        groups.setdefault(find(row), []).append(row)
    return list(groups.values())


def cache_file(size: int) -> Path:
    """Where the rendered glyphs are kept: the name holds a hash of the fonts, the renderer, the rules and the size."""
    folder = os.environ.get("ONETHRESHOLD_CACHE")
    root = Path(folder) if folder else Path.home() / ".cache" / "onethreshold"
    total = hashlib.sha256(f"{_VERSION}/{size}/{pillow_version}/{features.version('freetype2')}".encode())
    for face in (*DEJAVU, *STIX):
        total.update(hashlib.sha256(_file(face).read_bytes()).digest())
    return root / f"glyphs-{size}-{total.hexdigest()[:16]}.npz"


def _cached(size: int) -> Glyphs:
    path = cache_file(size)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Glyphs(arrays["pixels"], arrays["labels"], arrays["codes"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("%s is not readable (%s); rendering the glyphs again", path, error)
    made = build(size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, made)
    except OSError as error:
        _log.warning("the glyphs could not be kept in %s (%s); they are rendered again each time", path, error)
    return made


def _write(path: Path, made: Glyphs) -> None:
    # Several processes may write at once; each replaces the file as a whole.
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, pixels=made.pixels, labels=made.labels_N, codes=made.codes_C)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _file(face: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


def _coded(face: str) -> set[int]:
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(str(_file(face))).get_charmap())
