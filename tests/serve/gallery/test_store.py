"""A gallery on the disk against a dict: the same items after any changes, searched and listed as a loop would."""

import logging
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.gallery import store
from serve.gallery.items import Item, Put, Remove, Settings, decode, encode
from serve.gallery.store import Add, OtherDimensionError, OtherModelError, Store, TooManyItemsError
from tests.serve.gallery.rows import items, nearest, units

MANY = 10**6
ROWS = units(64)
IDS = st.sampled_from([f"item {number}" for number in range(12)] + ["ä/b.png", "z" * 512])
NEW = st.lists(
    st.tuples(IDS, st.integers(0, 63), st.none() | st.just('{"price":1}'), st.none() | st.sampled_from([b"A", b"B"])),
    min_size=1,
    max_size=6,
)


def opened(folder: Path, **kind: Any) -> Store:
    folder.mkdir()
    store.make(folder, Settings(created=1, **kind))
    return Store(folder)


class AgainstADict(RuleBasedStateMachine):
    """Any changes in any order, with the gallery closed and opened in between."""

    @initialize(keep=st.booleans())
    def begin(self, keep: bool) -> None:
        self.scratch = TemporaryDirectory()
        self.keep = keep
        self.folder = Path(self.scratch.name) / "shop"
        self.store = opened(self.folder, keep_images=keep)
        self.model: dict[str, Item] = {}

    @rule(together=st.lists(NEW | IDS, min_size=1, max_size=3))
    def commit(self, together: list[Any]) -> None:
        changes: list[Add | Remove] = []
        expected = []
        for each in together:
            if isinstance(each, str):
                changes.append(Remove([each]))
                expected.append(int(self.model.pop(each, None) is not None))
            else:
                added = {name: Item(name, ROWS[row], text, image) for name, row, text, image in each}
                changes.append(Add("shop@1", [Item(n, ROWS[r], t, i) for n, r, t, i in each]))
                expected.append(len(added.keys() & self.model.keys()))
                self.model |= added
        assert self.store.commit(changes, MANY) == expected

    @rule()
    def open_again(self) -> None:
        self.store.close()
        self.store = Store(self.folder)

    @rule()
    def write_anew(self) -> None:
        self.store._garbage = store._GARBAGE + 1
        self.store.tidy()

    @precondition(lambda self: self.keep and self.model)
    @rule(start=st.integers(0, 63))
    def embed_anew(self, start: int) -> None:
        images = sorted({item.image for item in self.model.values() if item.image})
        rows = {data: ROWS[(start + place) % 64] for place, data in enumerate(images)}
        digests = {digest: rows[data] for _, digest, data in self.store.images("", 100, ())}
        missing = self.store.reembed("shop@2", digests)
        assert missing == sum(item.image is None for item in self.model.values())
        if not missing:
            self.model = {
                name: Item(name, rows[item.image], item.metadata, item.image)  # type: ignore[index]
                for name, item in self.model.items()
            }
            assert self.store.reembed("shop@1", digests) == 0

    @invariant()
    def it_finds_what_a_loop_finds(self) -> None:
        found = self.store.search(ROWS[0], "shop@1", 5) if self.model else []
        expected = nearest({name: item.row for name, item in self.model.items()}, ROWS[0], 5)
        np.testing.assert_allclose([each.distance for each in found], [d for _, d in expected], atol=1e-6)
        for each in found:
            assert each.metadata == self.model[each.id].metadata
            assert each.distance == pytest.approx(np.linalg.norm(self.model[each.id].row - ROWS[0]), abs=1e-6)
        assert len({each.id for each in found}) == len(found)

    @invariant()
    def it_lists_all_items_in_order(self) -> None:
        listed = [(each.id, each.metadata, each.image) for each in self.store.page("", 100)]
        kept = {name: self.keep and item.image is not None for name, item in self.model.items()}
        assert listed == [(name, self.model[name].metadata, kept[name]) for name in sorted(self.model)]
        assert len(self.store) == len(self.model)
        pages, after = [], ""
        while page := self.store.page(after, 2):
            pages += page
            after = page[-1].id
        assert [each.id for each in pages] == sorted(self.model)

    @invariant()
    def it_keeps_just_the_images_that_items_show(self) -> None:
        shown = {item.image for item in self.model.values() if item.image and self.keep}
        on_disk = {path.read_bytes() for path in (self.folder / "images").glob("*/*")}
        assert on_disk == shown
        assert self.store.kept_images == len(shown)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.scratch.cleanup()


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=40, stateful_step_count=15, deadline=None, database=None)


def test_a_change_is_read_as_it_was_written() -> None:
    rows = units(3, dim=5)
    changes = [
        Settings(1, True, "shop@1", 5),
        Put(["a", "b"], rows[:2], ["{}", None]),
        Remove(["a"]),
        Put(["c"], rows[2:]),
    ]
    back = list(decode(memoryview(encode(changes))))
    assert back[0] == changes[0]
    assert back[2] == changes[2]
    for got, put in ((back[1], changes[1]), (back[3], changes[3])):
        assert isinstance(got, Put)
        assert isinstance(put, Put)
        assert (list(got.ids), list(got.metadata)) == (list(put.ids), list(put.metadata))
        np.testing.assert_array_equal(got.rows, put.rows)


def test_items_of_another_model_are_refused_and_the_others_of_the_same_wait_are_kept(tmp_path: Path) -> None:
    shop = opened(tmp_path / "shop")
    mine, other = Add("shop@1", items(2)), Add("shop@2", items(2, "other"))
    first, second, third = shop.commit([mine, other, Remove(["item-0000"])], MANY)
    assert (first, third) == (0, 1)
    assert isinstance(second, OtherModelError)
    assert str(second) == "its items were embedded by shop@1, these by shop@2"
    with pytest.raises(OtherModelError, match="embedded by shop@1, the query by shop@2"):
        shop.search(units(1)[0], "shop@2", 1)
    assert [each.id for each in shop.page("", 10)] == ["item-0001"]


def test_rows_of_another_dimension_never_reach_the_log(tmp_path: Path) -> None:
    """A label is that of a folder, in which another model may lie by now."""
    shop = opened(tmp_path / "shop")
    assert shop.commit([Add("m@1", items(3))], MANY) == [0]
    before = (tmp_path / "shop" / store.FILE).read_bytes()
    mixed = Add("m@1", [*items(2, "mixed"), *items(1, "narrow", dim=4)])
    outcomes = shop.commit([Add("m@1", items(2, "narrow", dim=4)), mixed], MANY)
    assert [type(each) for each in outcomes] == [OtherDimensionError] * 2
    assert str(outcomes[0]) == "its embeddings by m@1 have 8 numbers, and these 4"
    assert (tmp_path / "shop" / store.FILE).read_bytes() == before
    with pytest.raises(OtherDimensionError, match="by m@1 have 8 numbers, and the query 4"):
        shop.search(units(1, 4)[0], "m@1", 1)
    assert shop.commit([Add("m@1", items(1, "good"))], MANY) == [0]
    shop.close()
    shop = Store(tmp_path / "shop")
    assert (len(shop), shop.search(units(1)[0], "m@1", 1)[0].distance) == (4, 0.0)


def test_the_first_items_of_a_gallery_are_of_one_dimension(tmp_path: Path) -> None:
    shop = opened(tmp_path / "shop")
    first, second = shop.commit([Add("m@1", items(1)), Add("m@1", items(1, "narrow", dim=4))], MANY)
    assert first == 0
    assert isinstance(second, OtherDimensionError)
    shop.commit([Remove(["item-0000"])], MANY)
    [mixed] = shop.commit([Add("m@1", [*items(1), *items(1, "narrow", dim=4)])], MANY)
    assert isinstance(mixed, OtherDimensionError)
    assert len(shop) == 0


def test_an_emptied_gallery_takes_any_model(tmp_path: Path) -> None:
    shop = opened(tmp_path / "shop")
    shop.commit([Add("shop@1", items(1)), Remove(["item-0000"])], MANY)
    shop.commit([Add("wide@1", items(3, dim=12))], MANY)
    shop.close()
    shop = Store(tmp_path / "shop")
    assert (shop.settings.model, shop.settings.dim, len(shop)) == ("wide@1", 12, 3)
    assert shop.search(units(1, 12)[0], "wide@1", 1)[0].distance == 0.0


def test_no_more_items_than_allowed(tmp_path: Path) -> None:
    shop = opened(tmp_path / "shop")
    first, second, third = shop.commit([Add("m@1", items(3)), Add("m@1", items(2, "more")), Add("m@1", items(4))], 4)
    assert first == 0
    assert isinstance(second, TooManyItemsError)
    assert "it has 3 items and these are 2 more; at most 4" in str(second)
    assert third == 3, "three of them are replaced, and one is new"


def test_a_log_of_garbage_is_written_anew_with_what_counts(tmp_path: Path) -> None:
    shop = opened(tmp_path / "shop")
    for _ in range(12):
        shop.commit([Add("m@1", items(1000))], MANY)
        shop.tidy()
    assert shop.size < 3 * 1000 * (8 * 4 + 20), "one or two generations are left of twelve"
    shop.close()
    assert [each.id for each in Store(tmp_path / "shop").page("", 2000)] == [item.id for item in items(1000)]


def test_a_failed_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = opened(tmp_path / "shop")
    shop.commit([Add("m@1", items(2))], MANY)

    def failing(_: bytes) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(shop._log, "append", failing)
        with pytest.raises(OSError, match="no space left"):
            shop.commit([Add("m@1", items(5))], MANY)
    assert len(shop) == 2
    assert shop.commit([Add("m@1", items(5))], MANY) == [2]


FULL = """
import resource, sys
from contextlib import contextmanager
from pathlib import Path

from serve.gallery import store
from serve.gallery.items import Item, Remove
from tests.serve.gallery.rows import items, units
from tests.serve.gallery.test_store import MANY, opened

@contextmanager
def full_beyond(size):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    except OSError:
        pass
    else:
        raise AssertionError("it fitted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

folder = Path(sys.argv[1])
shop = opened(folder, keep_images=True)

def files():
    return sorted(path.name for path in folder.rglob("*") if path.is_file())

def add(*images):
    rows = units(len(images))
    return store.Add("m@1", [Item(f"{n}", row, image=image) for n, (row, image) in enumerate(zip(rows, images))])

shop.commit([add(b"kept")], MANY)
before = files()
assert len(before) == 2, before
with full_beyond(4000):
    shop.commit([add(b"kept", b"fits"), add(b"fits too", bytes(5000))], MANY)
assert files() == before, "images of items that did not come"
with full_beyond(10):
    shop.commit([add(b"kept", b"fits")], MANY)
assert files() == before, "images of items that the log did not take"
assert shop.kept_images == 1
assert shop.commit([add(b"kept", b"fits", bytes(5000))], MANY) == [1]

store._GARBAGE = 1000
shop.commit([store.Add("m@1", items(1000))] * 3, MANY)
before = files()
with full_beyond(4000):
    shop.tidy()
assert files() == before, "half of a log"
size = shop.size
shop.tidy()
assert shop.size == size, "not before there is more to win"
assert shop.commit([Remove(["0"])], MANY) == [1]
shop.commit([store.Add("m@1", items(1000))], MANY)
shop.tidy()
assert shop.size < size / 2
shop.close()
assert len(store.Store(folder)) == 1002
"""


def test_a_full_disk_keeps_nothing_of_what_it_had_no_room_for(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow for a moment."""
    ended = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "shop")], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_images_that_a_crash_left_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The process ended after an image was written and before the item was; the half of the item is dropped."""
    folder = tmp_path / "shop"
    shop = opened(folder, keep_images=True)
    shop.commit([Add("m@1", [Item("a", units(1)[0], image=b"A")])], MANY)
    size = shop.size
    shop.commit([Add("m@1", [Item("b", units(1)[0], image=b"B")])], MANY)
    shop.close()
    with (folder / store.FILE).open("r+b") as file:
        file.truncate(size + 9)
    with caplog.at_level(logging.WARNING):
        shop = Store(folder)
    assert "9 bytes were not written whole" in caplog.text
    assert [each.id for each in shop.page("", 10)] == ["a"]
    assert [path.read_bytes() for path in (folder / "images").glob("*/*")] == [b"A"]
