"""The glyphs: which characters look the same, that they are drawn alike every time, and their cache."""

import logging
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dml.config import DataConfig
from dml.data import glyphs
from dml.data.glyphs import Glyphs
from tests.contracts.dataset_contract import DatasetContract

CONFIG = DataConfig()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ONETHRESHOLD_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def built(cache: Path) -> Glyphs:
    return glyphs.build(32)


@pytest.fixture(scope="module")
def groups() -> dict[str, str]:
    """For each character, all that look the same."""
    codes = glyphs.characters()
    found = glyphs.look_alikes([glyphs.render(face, codes, 32) for face in glyphs.DEJAVU])
    texts = ["".join(chr(codes[row]) for row in group) for group in found]
    return {character: text for text in texts for character in text}


class TestGlyphsContract(DatasetContract):
    @pytest.fixture
    def config(self) -> DataConfig:
        return CONFIG


def test_there_are_enough_classes_to_hold_many_out(built: Glyphs) -> None:
    assert len(built.codes_C) >= 1500
    counts_C = np.bincount(built.labels_N)
    assert counts_C.max() == 16
    assert np.median(counts_C) == 12


@pytest.mark.parametrize("look_alike", ["AΑА", "oοо", "IΙІ", "ëё", "ΓГ", "\u2010\u2011", "ɛε", "\u03a9\u2126"])
def test_characters_that_look_the_same_are_one(look_alike: str, groups: dict[str, str]) -> None:
    assert set(look_alike) <= set(groups[look_alike[0]])


@pytest.mark.parametrize(
    "different",
    [
        "AẠ",
        "AÅ",
        "AÄ",
        "O0",
        "Oo",
        "OÖ",
        "OΘ",
        "Il",
        "l1",
        ",'",
        ".·",
        "-–",
        "ŎǑ",
        "EÈ",
        "MṀ",
        "ἀἁ",
        "sS",
        "⊖⊝",
        "▌▐",
        "hħ",
    ],
)
def test_characters_that_differ_stay_apart(different: str, groups: dict[str, str]) -> None:
    one, other = different
    assert other not in groups[one]


def test_no_chain_of_likenesses_merges_unlike_characters(groups: dict[str, str]) -> None:
    """Whatever is one class has one base letter shape: accents, as Unicode decomposes them, are the same."""
    for text in set(groups.values()):
        assert len(text) <= 4
        above = {
            tuple(
                unicodedata.name(mark)
                for mark in unicodedata.normalize("NFD", character)
                if unicodedata.combining(mark)
            )
            for character in text
            if "LATIN" in unicodedata.name(character)
        }
        assert len(above) <= 1, text


def test_look_alikes_need_most_faces_and_connect() -> None:
    """Five drawings in twelve faces: 0 and 1 agree in seven, 1 and 2 in the other way round, 3 with 0 in only six."""
    generator = np.random.default_rng(0)
    faces = []
    for number in range(12):
        drawn = generator.integers(0, 256, (5, 8, 8), dtype=np.uint8)
        if number < 7:
            drawn[1] = drawn[0]
        if number >= 5:
            drawn[2] = drawn[1]
        if number < 6:
            drawn[3] = drawn[0]
        faces.append(drawn)
    assert glyphs.look_alikes(faces) == [[0, 1, 2], [3], [4]]


def test_a_slight_difference_is_the_same_look_and_a_dot_is_not() -> None:
    letter = np.zeros((20, 20), dtype=np.uint8)
    letter[4:16, 8:12] = 255
    hinted, dotted = letter.copy(), letter.copy()
    hinted[4, 8] = 200
    dotted[18, 9] = 255
    assert glyphs.look_alikes([np.stack([letter, hinted, dotted])] * 12) == [[0, 1], [2]]


def test_no_class_holds_an_image_twice(built: Glyphs) -> None:
    seen: dict[int, set[bytes]] = defaultdict(set)
    for label, image in zip(built.labels_N.tolist(), built.pixels, strict=True):
        assert image.tobytes() not in seen[label]
        seen[label].add(image.tobytes())
    assert min(map(len, seen.values())) >= 2


def test_classes_are_named_after_their_lowest_code_point() -> None:
    names = glyphs.glyphs(CONFIG).classes
    assert "U+0041 LATIN CAPITAL LETTER A" in names
    assert not {"U+0391 GREEK CAPITAL LETTER ALPHA", "U+0410 CYRILLIC CAPITAL LETTER A"} & set(names)
    assert len(set(names)) == len(names)


def test_every_glyph_has_ink_and_is_centred_on_it(built: Glyphs) -> None:
    inked = built.pixels.max(1) > 0
    assert inked.any(1).all()
    left, right = inked.argmax(1), inked[:, ::-1].argmax(1)
    assert np.abs(left - right).max() <= 1


def test_size_and_baseline_are_common_so_position_tells_characters_apart() -> None:
    comma, apostrophe, small, capital = glyphs.render("DejaVuSans", [ord(c) for c in ",'oO"], 32) > 0
    rows = np.arange(32)
    assert rows[comma.any(1)].min() > rows[apostrophe.any(1)].max()
    assert small.any(1).sum() < capital.any(1).sum()
    assert abs(int(rows[small.any(1)].max()) - int(rows[capital.any(1)].max())) <= 1


def test_wide_glyphs_are_drawn_smaller_rather_than_cut() -> None:
    wide, letter = glyphs.render("DejaVuSans", [0x27F6, ord("A")], 32) > 0
    assert 29 <= wide.any(0).sum() <= 32
    assert letter.any(1).sum() >= 17


def test_spaces_marks_and_controls_are_no_characters_here() -> None:
    categories = {unicodedata.category(chr(code))[0] for code in glyphs.characters()}
    assert categories == {"L", "N", "P", "S"}


def test_channels_repeat_the_grey() -> None:
    images = glyphs.glyphs(CONFIG.model_copy(update={"channels": 3})).source.images(np.array([0, 5]))
    assert images[0].shape == (3, 32, 32)
    assert torch.equal(images[0][0], images[0][2])


def test_the_cache_holds_what_is_built_and_is_read_again(
    built: Glyphs, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = glyphs.glyphs(CONFIG)
    assert [file.suffix for file in cache.iterdir()] == [".npz"]
    np.testing.assert_array_equal(first.source.images(np.arange(len(built.labels_N)))[:, 0], built.pixels)
    monkeypatch.setattr(glyphs, "build", lambda size: pytest.fail("rendered again"))
    assert glyphs.glyphs(CONFIG).identity == first.identity


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty"])
def test_a_damaged_cache_is_built_again(
    damage: str, built: Glyphs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    identity = glyphs.glyphs(CONFIG).identity
    file = glyphs.cache_file(32)
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    damaged = {"truncated": bytes(data[: len(data) // 2]), "flipped": bytes(data), "text": b"no zip", "empty": b""}
    file.write_bytes(damaged[damage])
    monkeypatch.setattr(glyphs, "build", lambda size: built)
    with caplog.at_level(logging.WARNING):
        assert glyphs.glyphs(CONFIG).identity == identity
    assert "rendering the glyphs again" in caplog.text
    caplog.clear()
    assert glyphs.glyphs(CONFIG).identity == identity
    assert not caplog.text, "the rebuilt file is whole"


def test_without_a_writable_cache_it_works_and_says_so(
    built: Glyphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ONETHRESHOLD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(glyphs, "build", lambda size: built)
    assert len(glyphs.glyphs(CONFIG).labels_N) == len(built.labels_N)
    assert "could not be kept" in caplog.text


def test_the_cache_is_named_by_size_and_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert glyphs.cache_file(32).name != glyphs.cache_file(16).name
    monkeypatch.setenv("ONETHRESHOLD_CACHE", str(tmp_path))
    assert glyphs.cache_file(32).parent == tmp_path
    monkeypatch.delenv("ONETHRESHOLD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert glyphs.cache_file(32).parent == tmp_path / ".cache" / "onethreshold"
