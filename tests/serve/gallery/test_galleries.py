"""Many galleries in one folder: one writer, writes that wait for the disk together, names, limits and damage."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.gallery import galleries as module
from serve.gallery import store
from serve.gallery.deployment import Refusal, Replica
from serve.gallery.galleries import Galleries
from serve.gallery.items import Item, Settings
from serve.gallery.limits import GalleryLimits
from serve.gallery.lock import FolderLock, WrittenElsewhereError
from serve.gallery.log import HEAD, create
from serve.gallery.reembed import reembed
from serve.schemas import ApiError
from tests.serve.gallery.rows import Row, items, units


def run(folder: Path, ask: Callable[[Galleries], Awaitable[Any]], **options: Any) -> Any:
    """Opens the galleries, asks, and closes them."""

    async def asked() -> Any:
        galleries = Galleries(folder, **options)
        try:
            return await ask(galleries)
        finally:
            await galleries.close()

    return asyncio.run(asked())


async def refused(asked: Awaitable[Any]) -> tuple[int, str, str]:
    with pytest.raises(ApiError) as raised:
        await asked
    return raised.value.status, str(raised.value.code), raised.value.message


def test_galleries_survive_a_restart(tmp_path: Path) -> None:
    async def fill(galleries: Galleries) -> None:
        assert await galleries.create("shop", None)
        assert await galleries.create("other", True)
        assert not await galleries.create("shop", None)
        assert await galleries.add("shop", "m@1", items(3)) == 0
        assert await galleries.add("shop", "m@1", items(5)) == 3
        await galleries.remove("shop", "item-0001")

    async def look(galleries: Galleries) -> None:
        assert await galleries.names() == ["other", "shop"]
        info = await galleries.info("shop")
        assert (info.items, info.model, info.dim, info.keep_images) == (4, "m@1", 8, False)
        assert (await galleries.info("other")).keep_images
        assert [each.id for each in await galleries.page("shop", "item-0001", 2)] == ["item-0002", "item-0003"]
        [found, *_] = await galleries.search("shop", "m@1", units(1)[0], 2)
        assert (found.id, found.distance) == ("item-0000", 0.0)
        await galleries.delete("shop")
        assert await refused(galleries.search("shop", "m@1", units(1)[0], 2)) == (
            404, "gallery_not_found", "unknown gallery 'shop'; valid: other; PUT /v1/galleries/NAME makes one",
        )  # fmt: skip

    run(tmp_path, fill)
    run(tmp_path, look)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "other"]


def test_additions_at_the_same_time_wait_for_the_disk_together_and_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[int] = []
    real = store.Store.commit

    def counted(self: store.Store, adds: Any, most: int) -> Any:
        commits.append(len(adds))
        return real(self, adds, most)

    monkeypatch.setattr(store.Store, "commit", counted)

    async def many(galleries: Galleries) -> None:
        await galleries.create("shop", None)
        rows = units(200)
        adding = [galleries.add("shop", "m@1", [Item(f"{n:03d}", row)]) for n, row in enumerate(rows)]
        wrong = [refused(galleries.add("shop", "m@2", items(1))) for _ in range(5)]
        searching = [galleries.search("shop", "m@1", rows[0], 3) for _ in range(20)]
        done = await asyncio.gather(*adding, *wrong, *searching)
        assert done[:200] == [0] * 200
        assert {each[:2] for each in done[200:205]} == {(409, "gallery_of_another_model")}
        assert [each.id for each in await galleries.page("shop", "", 500)] == [f"{n:03d}" for n in range(200)]

    run(tmp_path, many)
    assert sum(commits) == 205
    assert len(commits) < 20, "205 requests, and far fewer waits for the disk"


def test_a_request_that_is_cancelled_takes_nothing_from_the_others(tmp_path: Path) -> None:
    async def ask(galleries: Galleries) -> None:
        await galleries.create("shop", None)
        tasks = [asyncio.create_task(galleries.add("shop", "m@1", items(1, f"of{n}"))) for n in range(30)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(each == 0 for each in done[1::2])
        there = {each.id for each in await galleries.page("shop", "", 100)}
        assert there >= {f"of{n}-0000" for n in range(1, 30, 2)}

    run(tmp_path, ask)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../etc", "a/b", "A", "-a", "a" * 64, "a\n", "ä", ".lock", "a.b", "\ud83d"]
)
def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    async def ask(galleries: Galleries) -> None:
        assert (await refused(galleries.create(name, None)))[:2] == (422, "bad_gallery_name")
        for asked in (galleries.info(name), galleries.delete(name), galleries.add(name, "m@1", items(1))):
            assert (await refused(asked))[:2] == (404, "gallery_not_found")

    run(tmp_path / "galleries", ask)
    assert [path.name for path in tmp_path.iterdir()] == ["galleries"]
    assert [path.name for path in (tmp_path / "galleries").iterdir()] == [".lock"]


def test_limits_are_told(tmp_path: Path) -> None:
    async def ask(galleries: Galleries) -> None:
        for name in ("a", "b"):
            await galleries.create(name, None)
        assert (await refused(galleries.create("c", None)))[:2] == (409, "too_many_galleries")
        assert await refused(galleries.add("a", "m@1", items(4))) == (
            413, "gallery_full", "gallery 'a': it has 0 items and these are 4 more; at most 3 are allowed",
        )  # fmt: skip
        assert (await refused(galleries.create("a", True)))[:2] == (409, "gallery_exists")
        assert (await refused(galleries.remove("a", "nobody")))[:2] == (404, "item_not_found")

    run(tmp_path, ask, limits=GalleryLimits(galleries=2, items=3))


def test_another_dimension_under_the_same_label_is_refused(tmp_path: Path) -> None:
    async def ask(galleries: Galleries) -> None:
        await galleries.create("shop", None)
        await galleries.add("shop", "m@1", items(2))
        for asked in (
            galleries.add("shop", "m@1", items(2, "narrow", dim=4)),
            galleries.search("shop", "m@1", units(1, 4)[0], 1),
        ):
            status, code, message = await refused(asked)
            assert (status, code) == (409, "gallery_of_another_model")
            assert "embeddings by m@1 have 8 numbers, and " in message
        assert (await galleries.info("shop")).items == 2

    run(tmp_path, ask)


def test_a_damaged_gallery_is_told_and_the_others_are_served(tmp_path: Path) -> None:
    async def fill(galleries: Galleries) -> None:
        for name in ("good", "bad"):
            await galleries.create(name, None)
            await galleries.add(name, "m@1", items(2))
            await galleries.add(name, "m@1", items(4))

    async def look(galleries: Galleries) -> None:
        assert await galleries.names() == ["good"]
        status, code, message = await refused(galleries.info("bad"))
        assert (status, code) == (409, "gallery_damaged")
        assert str(tmp_path) not in message
        assert (await refused(galleries.create("bad", None)))[1] == "gallery_damaged"
        assert (await galleries.info("good")).items == 4
        await galleries.delete("bad")
        assert await galleries.create("bad", None)

    run(tmp_path, fill)
    path = tmp_path / "bad" / store.FILE
    data = bytearray(path.read_bytes())
    data[len(HEAD) + 40] ^= 1
    path.write_bytes(data)
    run(tmp_path, look)


def test_a_gallery_of_a_later_version_takes_no_other_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its settings have a field more, which is passed over; changes of an unknown kind and values that fit nowhere."""

    def frame(*changes: Any) -> bytes:
        head = json.dumps(changes).encode()
        return len(head).to_bytes(4, "little") + head

    settings = {"created": 1, "model": "m@1", "dim": 8}
    for name, payload in {
        "more": frame(["settings", settings | {"note": "new"}]),
        "kind": frame(["settings", settings], ["merge", ["a"]]),
        "value": frame(["settings", settings | {"dim": "8"}]),
        "short": b"{}",
    }.items():
        (tmp_path / name).mkdir()
        create(tmp_path / name / store.FILE, [payload])

    async def look(galleries: Galleries) -> None:
        assert await galleries.names() == ["more"]
        await galleries.add("more", "m@1", items(2))
        for name in ("kind", "value", "short"):
            assert (await refused(galleries.info(name)))[:2] == (409, "gallery_damaged")

    run(tmp_path, look)
    assert "gallery kind cannot be read: ValueError: a change of the unknown kind 'merge'" in caplog.text


def test_what_was_made_or_deleted_by_half_is_cleared_away(tmp_path: Path) -> None:
    half = tmp_path / f".shop-{'0123' * 8}"
    half.mkdir()
    (half / "items.log").write_bytes(b"half")

    async def look(galleries: Galleries) -> None:
        assert await galleries.names() == []

    run(tmp_path, look)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_galleries_did_not_make_is_left_alone(tmp_path: Path) -> None:
    foreign = [".git", ".shop-0123", "My Photos", "lost+found", "src", ".shop-" + "g" * 32]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    (tmp_path / "src" / "items.new").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()

    async def look(galleries: Galleries) -> None:
        assert await galleries.names() == []
        for name in ("src", "empty", "file"):
            assert await refused(galleries.create(name, None)) == (
                409, "name_taken",
                f"'{name}' is in the galleries' folder already and is no gallery: take another name, or move it away",
            )  # fmt: skip
            assert (await refused(galleries.delete(name)))[:2] == (404, "gallery_not_found")
        assert await galleries.create("shop", None)

    run(tmp_path, look)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*foreign, ".lock", "empty", "file", "shop"])
    assert all((tmp_path / name / "kept").exists() for name in foreign)
    assert (tmp_path / "src" / "items.new").exists()


def test_a_second_writer_is_refused_in_words(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    code = (
        "import sys; from pathlib import Path; from serve.gallery.lock import FolderLock; FolderLock(Path(sys.argv[1]))"
    )
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert told.returncode != 0
    assert f"is written by process {os.getpid()} on " in told.stderr
    with pytest.raises(WrittenElsewhereError, match="stop it first"):
        FolderLock(tmp_path, patience=0.2)
    lock.release()
    FolderLock(tmp_path).release()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_replica_comes_up_beside_the_one_that_writes_and_takes_over_after_it(tmp_path: Path) -> None:
    async def fill(galleries: Galleries) -> None:
        await galleries.create("shop", None)

    run(tmp_path, fill)
    lock = FolderLock(tmp_path)
    replica = Replica(str(tmp_path), GalleryLimits(), 1)

    async def ask() -> None:
        refusal = await replica.names()
        assert isinstance(refusal, Refusal)
        assert (refusal.status, refusal.code) == (503, "galleries_unavailable")
        replica.check_health()
        lock.release()
        async with asyncio.timeout(10):
            while isinstance(answer := await replica.names(), Refusal):
                await asyncio.sleep(0.05)
        assert answer == ["shop"]
        assert replica.galleries is not None
        await replica.galleries.close()

    asyncio.run(ask())


def test_a_replica_that_cannot_take_over_is_not_healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FolderLock(tmp_path)
    replica = Replica(str(tmp_path), GalleryLimits(), 1)

    def broken(*_: Any) -> None:
        raise PermissionError("no right to read")

    monkeypatch.setattr(module.Galleries, "_read", broken)
    (tmp_path / "shop").mkdir()
    store.make(tmp_path / "shop", Settings(created=0))
    lock.release()

    def told() -> str:
        try:
            replica.check_health()
        except PermissionError as error:
            return str(error)
        return ""

    deadline = time.monotonic() + 10
    while not told() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert told() == "no right to read"


async def by_length(images: Any) -> Row:
    """A model that embeds a file by its length."""
    return units(64)[[len(data) for _, data in images]]


def pictures(count: int, start: int = 0) -> list[Item]:
    return [Item(f"{n:03d}", units(1)[0], image=bytes(n % 7)) for n in range(start, start + count)]


def test_a_gallery_with_images_is_embedded_anew_while_items_come(tmp_path: Path) -> None:
    async def ask(galleries: Galleries) -> None:
        await galleries.create("shop", True)
        await galleries.add("shop", "m@1", pictures(40))
        query = units(64)[3]
        status, code, message = await refused(galleries.search("shop", "m@2", query, 1))
        assert (status, code) == (503, "gallery_reembedding")
        assert "embedded by m@1, and m@2 is served" in message
        assert await galleries.claim("shop", "m@2")
        assert not await galleries.claim("shop", "m@2"), "somebody is at it"
        batches = 0

        async def embed(images: Any) -> Row:
            nonlocal batches
            batches += 1
            if batches == 1:  # the old model still answers on other replicas
                await galleries.add("shop", "m@1", [Item("new", units(1)[0], image=bytes(20))])
                assert (await galleries.search("shop", "m@1", units(1)[0], 1))[0].distance == 0.0
            progress = (await galleries.info("shop")).reembedding
            assert progress is not None
            assert (progress.model, progress.done < progress.of) == ("m@2", True)
            return await by_length(images)

        await reembed(galleries, "shop", "m@2", embed, lambda: True)
        info = await galleries.info("shop")
        assert (info.model, info.items, info.reembedding) == ("m@2", 41, None)
        found = await galleries.search("shop", "m@2", query, 6)
        assert {each.id for each in found if each.distance == 0.0} == {f"{n:03d}" for n in range(3, 40, 7)}
        assert [each.id for each in await galleries.search("shop", "m@2", units(64)[20], 1)] == ["new"]
        assert (await refused(galleries.add("shop", "m@1", pictures(1))))[0] == 503, "it goes back as it came"

    async def look(galleries: Galleries) -> None:
        assert (await galleries.info("shop")).model == "m@2"
        assert (await galleries.search("shop", "m@2", units(64)[3], 1))[0].distance == 0.0

    run(tmp_path, ask)
    run(tmp_path, look)


def test_items_without_images_cannot_be_embedded_anew(tmp_path: Path) -> None:
    async def ask(galleries: Galleries) -> None:
        await galleries.create("shop", True)
        await galleries.add("shop", "m@1", [*pictures(3), *items(2)])
        for asked in (galleries.search("shop", "m@2", units(1)[0], 1), galleries.claim("shop", "m@2")):
            status, code, message = await refused(asked)
            assert (status, code) == (409, "gallery_of_another_model")
            assert "2 of its 5 items have no kept image" in message
            assert "python -m serve.gallery rebuild shop --from emb.parquet" in message

    run(tmp_path, ask)


def test_an_image_that_the_new_model_cannot_take_leaves_the_gallery_as_it_is(tmp_path: Path) -> None:
    async def ask(galleries: Galleries) -> None:
        await galleries.create("shop", True)
        await galleries.add("shop", "m@1", pictures(3))
        assert await galleries.claim("shop", "m@2")

        async def embed(images: Any) -> Row:
            raise ApiError(422, f"{images[0][0]} is unreadable")

        assert (await refused(reembed(galleries, "shop", "m@2", embed, lambda: True)))[0] == 422
        status, code, message = await refused(galleries.search("shop", "m@2", units(1)[0], 1))
        assert (status, code) == (409, "gallery_of_another_model")
        assert "anew failed: item '000' is unreadable" in message
        assert len(await galleries.search("shop", "m@1", units(1)[0], 9)) == 3
        assert await galleries.claim("shop", "m@2"), "it can be tried again"

    run(tmp_path, ask)


@pytest.mark.parametrize("why", ["overloaded", "disk_failed", "another model"])
def test_what_passes_ends_a_claim_but_not_the_embedding_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr("serve.gallery.reembed.TRIES", 1)
    embedded, asked = 0, 0

    async def embed(images: Any) -> Row:
        nonlocal embedded, asked
        asked += 1
        if why == "overloaded" and asked == 2:
            raise ApiError(503, "overloaded; try again", code="overloaded")
        embedded += len(images)
        return await by_length(images)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    async def ask(galleries: Galleries) -> None:
        await galleries.create("shop", True)
        await galleries.add("shop", "m@1", [Item(f"{n:03d}", units(1)[0], image=bytes(n)) for n in range(40)])
        assert await galleries.claim("shop", "m@2")
        with monkeypatch.context() as failing:
            if why == "disk_failed":
                failing.setattr(store.Store, "reembed", full)
            embedding = reembed(galleries, "shop", "m@2", embed, lambda: why != "another model" or embedded < 16)
            if why == "another model":
                await embedding
            else:
                assert (await refused(embedding))[:2] == (503, why)
        before = embedded
        assert before >= 16
        info = await galleries.info("shop")
        assert (info.model, info.reembedding) == ("m@1", None), "nobody is at it"
        assert (await refused(galleries.search("shop", "m@2", units(64)[3], 1)))[:2] == (503, "gallery_reembedding")
        assert await galleries.claim("shop", "m@2")
        await reembed(galleries, "shop", "m@2", embed, lambda: True)
        assert (await galleries.search("shop", "m@2", units(64)[3], 1))[0].id == "003"
        assert embedded == 40, "no image twice"

    run(tmp_path, ask)


def test_a_claim_ends_with_whoever_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.gallery.staging.LEASE_S", 0.0)

    async def ask(galleries: Galleries) -> None:
        await galleries.create("shop", True)
        await galleries.add("shop", "m@1", pictures(3))
        for model in ("m@2", "m@2", "m@3"):
            assert await galleries.claim("shop", model)
        assert (await refused(galleries.stage("shop", "m@2", {})))[1] == "not_claimed"

    run(tmp_path, ask)


def test_a_large_gallery_gets_an_index_by_itself(tmp_path: Path) -> None:
    from tests.serve.gallery.rows import clustered

    async def ask(galleries: Galleries) -> None:
        await galleries.create("shop", None)
        rows = clustered(3000)
        for start in range(0, 3000, 1000):
            await galleries.add("shop", "m@1", [Item(f"{n}", rows[n]) for n in range(start, start + 1000)])
        while (await galleries.info("shop")).index.kind == "flat":
            await asyncio.sleep(0.02)
        report = (await galleries.info("shop")).index
        assert (report.kind, report.recall >= 0.99, report.measured_on) == ("ivf", True, 256)
        exact = np.argsort(np.linalg.norm(rows - rows[7], axis=1))[:10]
        found = await galleries.search("shop", "m@1", rows[7], 10)
        assert len({each.id for each in found} & {str(n) for n in exact}) >= 9

    run(tmp_path, ask, exact_up_to=1000)


def test_a_bug_is_told_to_whoever_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module.Store, "commit", broken)

    async def ask(galleries: Galleries) -> None:
        await galleries.create("shop", None)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(galleries.add("shop", "m@1", items(1)), 10)

    run(tmp_path, ask)
