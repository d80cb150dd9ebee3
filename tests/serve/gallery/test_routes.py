"""The HTTP of galleries on the real app with a dummy model: the shapes of answers, and what is refused and how."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serve import api
from serve.calibration import Calibration
from serve.gallery.galleries import Galleries
from serve.gallery.limits import GalleryLimits
from serve.limits import Limits
from tests.serve.pictures import Held, MeanColour, data_uri, noise, png

LIMITS = Limits(images=4, image_bytes=20_000, request_bytes=200_000, pixels=10_000, requests_per_second=1e6)
AT_MOST = GalleryLimits(galleries=20, items=50, items_a_request=8, metadata_bytes=100, neighbours=20)
RED, GREEN, BLUE = (data_uri(png(colour)) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
POINTS = [
    {"far_target": far, "threshold": threshold, "far": far, "frr": 0.1, "negatives": 9, "positives": 9}
    for far, threshold in ((0.001, 0.2), (0.01, 0.5), (0.1, 1.0))
]


class Calibrated(MeanColour):
    calibration = Calibration.of(POINTS)


def serving(folder: Path, model: MeanColour | None = None) -> tuple[FastAPI, Held]:
    held = Held(model or Calibrated())
    galleries = Galleries(folder, AT_MOST)
    return api.build(held, LIMITS, galleries=galleries, gallery_limits=AT_MOST), held


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    app, _ = serving(tmp_path)
    with TestClient(app, raise_server_exceptions=False) as made:
        made.put("/v1/galleries/shop")
        yield made


def add(client: TestClient, *items: Any, gallery: str = "shop", **more: Any) -> Any:
    answer = client.post(f"/v1/galleries/{gallery}/items", json={"items": list(items), **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def search(client: TestClient, query: Any, **more: Any) -> Any:
    answer = client.post("/v1/search", json={"gallery": "shop", "query": query, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def error(answer: Any) -> tuple[int, str | None, str | None, str]:
    assert set(answer.json()) == {"error"}
    assert len(answer.text) < 1000
    detail = answer.json()["error"]
    return answer.status_code, detail["code"], detail["param"], detail["message"]


def test_a_kept_image_comes_back_as_it_was_and_as_nothing_but_an_image(client: TestClient) -> None:
    client.put("/v1/galleries/kept", json={"keep_images": True})
    jpeg = png((0, 0, 255), kind="JPEG")
    items = [
        {"id": "a/red 1.png", "input": RED},
        {"id": "blue", "input": data_uri(jpeg)},
        {"id": "row", "input": [1, 0, 0]},
    ]
    add(client, *items, gallery="kept")
    found = client.get("/v1/galleries/kept/items/a%2Fred%201.png/image")
    assert (found.status_code, found.content, found.headers["content-type"]) == (200, png((255, 0, 0)), "image/png")
    assert client.get("/v1/galleries/kept/items/blue/image").headers["content-type"] == "image/jpeg"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in found.headers["content-security-policy"]
    add(client, {"id": "red", "input": RED})
    for gallery, item in (("kept", "row"), ("kept", "gone"), ("shop", "red")):
        answer = client.get(f"/v1/galleries/{gallery}/items/{item}/image")
        assert error(answer)[:3] == (404, "image_not_found", "id")
    assert error(client.get("/v1/galleries/none/items/red/image"))[:2] == (404, "gallery_not_found")


@pytest.mark.parametrize(
    ("method", "path", "most"),
    [
        ("PUT", "/v1/galleries/new", 32_784),
        ("POST", "/v1/search", 32_784),
        ("POST", "/v1/galleries/shop/items", 32_784 + 8 * (3 + 3)),
    ],
)
def test_json_of_too_many_values_is_refused_unparsed(client: TestClient, method: str, path: str, most: int) -> None:
    kind = {"Content-Type": "application/json"}
    answer = client.request(method, path, content=b'{"a":[' + b"0," * (most + 1), headers=kind)
    assert error(answer)[:2] == (413, "too_many_values")
    assert client.request(method, path, content=b'{"a":[' + b"0," * most, headers=kind).status_code in (400, 422)


def test_images_and_embeddings_are_added_and_found(client: TestClient) -> None:
    done = add(
        client,
        {"id": "red", "input": RED, "metadata": {"price": 3, "tags": ["a", "ü"]}},
        {"id": "shoes/blue 1.png", "input": [0, 0, 2.5]},
    )
    assert done == {"object": "added", "added": 2, "replaced": 0, "gallery": "shop", "model": "colour@7"}
    answer = search(client, [3, 0, 4], far=0.1)
    assert [each["id"] for each in answer["data"]] == ["shoes/blue 1.png", "red"]
    near, far = answer["data"]
    assert near["distance"] == pytest.approx((2 - 2 * 0.8) ** 0.5)
    assert near["similarity"] == pytest.approx(0.8)
    assert (near["match"], far["match"]) == (True, True)
    assert (near["metadata"], far["metadata"]) == (None, {"price": 3, "tags": ["a", "ü"]})
    assert (answer["object"], answer["gallery"], answer["model"], answer["threshold"]) == (
        "search",
        "shop",
        "colour@7",
        1.0,
    )
    assert answer["operating_point"]["far_target"] == 0.1
    assert answer["calibration"] == Calibrated.calibration.id
    assert search(client, RED, k=1)["data"][0]["distance"] == 0.0


def test_what_decides_a_match(client: TestClient) -> None:
    add(client, {"id": "red", "input": RED}, {"id": "near", "input": [10, 4, 0]})
    for how, threshold, matches in (
        ({}, 0.5, [True, True]),
        ({"far": 0.001}, 0.2, [True, False]),
        ({"threshold": 0.0}, 0.0, [True, False]),
        ({"threshold": 2}, 2.0, [True, True]),
    ):
        answer = search(client, RED, **how)
        assert answer["threshold"] == threshold
        assert [each["match"] for each in answer["data"]] == matches
        assert (answer["operating_point"] is None) == ("threshold" in how)
    assert (
        error(client.post("/v1/search", json={"gallery": "shop", "query": RED, "far": 0.5}))[1] == "far_not_calibrated"
    )


def test_a_model_without_operating_points_finds_without_deciding(tmp_path: Path) -> None:
    app, _ = serving(tmp_path, MeanColour())
    with TestClient(app) as client:
        client.put("/v1/galleries/shop")
        add(client, {"id": "red", "input": RED})
        answer = search(client, RED)
        assert (answer["threshold"], answer["calibration"], answer["data"][0]["match"]) == (None, None, None)
        assert search(client, RED, threshold=0.5)["data"][0]["match"] is True


def test_galleries_are_made_described_listed_and_deleted(client: TestClient) -> None:
    made = client.put("/v1/galleries/photos", json={"keep_images": True})
    assert (made.status_code, made.json()["keep_images"]) == (201, True)
    assert client.put("/v1/galleries/photos").status_code == 200
    add(client, {"id": "a", "input": RED}, {"id": "b", "input": RED}, {"id": "c", "input": [1, 1, 1]}, gallery="photos")
    info = client.get("/v1/galleries/photos").json()
    assert info["index"] == {"kind": "flat", "lists": 0, "probes": 0, "recall": 1.0, "measured_on": 0}
    assert (info["items"], info["images"], info["without_image"], info["model"]) == (3, 1, 1, "colour@7")
    assert [each["name"] for each in client.get("/v1/galleries").json()["data"]] == ["photos", "shop"]
    assert client.delete("/v1/galleries/photos").json() == {"object": "deleted", "id": "photos"}
    assert client.get("/v1/galleries/photos").status_code == 404


def test_items_are_listed_in_pages_replaced_and_deleted(client: TestClient) -> None:
    for start in (0, 4):
        add(client, *({"id": f"{n}", "input": [1, n, 0], "metadata": {"n": n}} for n in range(start, start + 4)))
    pages, after = [], ""
    while after is not None:
        page = client.get("/v1/galleries/shop/items", params={"limit": 3, "after": after}).json()
        pages.append([each["id"] for each in page["data"]])
        after = page["after"]
    assert pages == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"]]
    assert add(client, {"id": "3", "input": BLUE})["replaced"] == 1
    assert search(client, BLUE)["data"][0] == {
        "id": "3", "metadata": None, "distance": 0.0, "similarity": 1.0, "match": True,
    }  # fmt: skip
    assert client.delete("/v1/galleries/shop/items/3").json() == {"object": "deleted", "id": "3"}
    assert error(client.delete("/v1/galleries/shop/items/3"))[:2] == (404, "item_not_found")
    assert len(search(client, BLUE, k=20)["data"]) == 7


@pytest.mark.parametrize("name", ["a/b/c.png", "a b", "ä?&#%/.", "..", "../../etc/passwd", "items", "a\u202fb"])
def test_any_id_can_be_deleted(client: TestClient, name: str) -> None:
    from urllib.parse import quote

    add(client, {"id": name, "input": RED})
    assert search(client, RED)["data"][0]["id"] == name
    answer = client.delete(f"/v1/galleries/shop/items/{quote(name, safe='').replace('.', '%2E')}")
    assert answer.status_code == 200, answer.text


DEEP = {"a": 1}
for _ in range(40):
    DEEP = {"a": DEEP}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("item", "status", "code", "says"),
    [
        ({"id": "", "input": RED}, 422, "invalid_request", "1 to 512 characters"),
        ({"id": "x" * 513, "input": RED}, 422, "invalid_request", "1 to 512 characters"),
        ({"id": "a\nb", "input": RED}, 422, "invalid_request", "control characters"),
        ({"id": "\ud83d", "input": RED}, 422, "invalid_request", "halves of characters"),
        ({"id": 3, "input": RED}, 422, "invalid_request", "string"),
        ({"input": RED}, 422, "invalid_request", "id"),
        ({"id": "a"}, 422, "invalid_request", "input"),
        ({"id": "a", "input": []}, 422, "invalid_request", "image"),
        ({"id": "a", "input": [1, "2", 3]}, 422, "invalid_request", "image"),
        ({"id": "a", "input": [1, 2]}, 422, "wrong_dimension", "items[0].input has 2 numbers"),
        ({"id": "a", "input": [0, 0, 0]}, 422, "not_an_embedding", "norm 0"),
        ({"id": "a", "input": [1, 2, float("nan")]}, 422, "not_an_embedding", "finite"),
        ({"id": "a", "input": "http://example.com/a.png"}, 400, "url_not_fetched", "not fetched"),
        ({"id": "a", "input": data_uri(noise(0)[:500])}, 422, "unreadable_image", "items[0].input"),
        ({"id": "a", "input": RED, "metadata": [1]}, 422, "invalid_request", "metadata"),
        ({"id": "a", "input": RED, "metadata": {"x": float("inf")}}, 422, "invalid_request", "JSON"),
        ({"id": "a", "input": RED, "metadata": {"x": "\ud83d"}}, 422, "invalid_request", "half a character"),
        ({"id": "a", "input": RED, "metadata": DEEP}, 422, "invalid_request", "nested deeper"),
        ({"id": "a", "input": RED, "metadata": {"x": "y" * 100}}, 413, "metadata_too_large", "100 bytes"),
        ({"id": "a", "input": RED, "color": 1}, 422, "invalid_request", "color"),
    ],
)
def test_bad_items_are_refused_in_words_and_nothing_is_added(
    client: TestClient, item: Any, status: int, code: str, says: str
) -> None:
    body = json.dumps({"items": [item, {"id": "good", "input": RED}]})
    answer = client.post("/v1/galleries/shop/items", content=body, headers={"Content-Type": "application/json"})
    got = error(answer)
    assert got[:2] == (status, code), got
    assert says in got[3]
    assert client.get("/v1/galleries/shop").json()["items"] == 0


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({"items": []}, 422, "invalid_request", "at least 1"),
        ({"items": [{"id": f"{n}", "input": [1, 2, 3]} for n in range(9)]}, 413, "too_many_items", "at most 8"),
        ({"items": [{"id": f"{n}", "input": RED} for n in range(5)]}, 413, "too_many_images", "at most 4"),
        ({"items": [{"id": "a", "input": [1, 2, 3]}] * 2}, 422, "id_twice", "'a' comes 2 times"),
        ({"items": [{"id": "a", "input": [1, 2, 3]}], "model": "colour@6"}, 404, "model_not_found", "colour@7"),
    ],
)
def test_bad_requests_for_items_are_refused(client: TestClient, body: Any, status: int, code: str, says: str) -> None:
    got = error(client.post("/v1/galleries/shop/items", json=body))
    assert got[:2] == (status, code)
    assert says in got[3]


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({"gallery": "shop"}, 422, "invalid_request", "query"),
        ({"gallery": "nobody", "query": RED}, 404, "gallery_not_found", "valid: shop"),
        ({"gallery": "../etc", "query": RED}, 404, "gallery_not_found", "valid: shop"),
        ({"gallery": "shop", "query": RED, "k": 0}, 422, "invalid_request", "greater than or equal to 1"),
        ({"gallery": "shop", "query": RED, "k": 21}, 422, "too_many_neighbours", "at most 20"),
        ({"gallery": "shop", "query": RED, "k": 10**30}, 422, "too_many_neighbours", "at most 20"),
        ({"gallery": "shop", "query": RED, "far": 0.1, "threshold": 1}, 422, "far_and_threshold", "one of them"),
        ({"gallery": "shop", "query": RED, "threshold": 3}, 422, "not_a_distance", "0 to 2"),
        ({"gallery": "shop", "query": RED, "model": "other"}, 404, "model_not_found", "colour@7"),
        ({"gallery": "shop", "query": [1, 2]}, 422, "wrong_dimension", "2 numbers"),
    ],
)
def test_bad_searches_are_refused(client: TestClient, body: Any, status: int, code: str, says: str) -> None:
    got = error(client.post("/v1/search", json=body))
    assert got[:2] == (status, code), got
    assert says in got[3]


@pytest.mark.parametrize("path", ["/v1/galleries/UPPER", "/v1/galleries/a.b", "/v1/galleries/%2E%2E"])
def test_bad_names_are_refused(client: TestClient, path: str) -> None:
    assert error(client.put(path))[:2] == (422, "bad_gallery_name")


@pytest.mark.parametrize("query", ["limit=0", "limit=9", "limit=x", "after=" + "x" * 600])
def test_bad_pages_are_refused(client: TestClient, query: str) -> None:
    assert error(client.get(f"/v1/galleries/shop/items?{query}"))[:2] == (422, "invalid_request")


def test_a_service_without_galleries_says_so() -> None:
    with TestClient(api.build(Held(MeanColour()), LIMITS)) as client:
        for answer in (
            client.post("/v1/search", json={}),
            client.get("/v1/galleries"),
            client.put("/v1/galleries/a"),
            client.post("/v1/galleries/a/items", json={}),
        ):
            assert error(answer)[:2] == (404, "no_galleries")
        assert not [path for path in client.get("/openapi.json").json()["paths"] if "galler" in path]


class Later(Calibrated):
    """Another version, which sees colours the other way round."""

    version = "8"

    def embed(self, inputs: Any) -> Any:
        return super().embed(inputs)[:, ::-1].copy()


def test_another_version_refuses_or_embeds_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.gallery.reembed.SETTLE_S", 0.3)
    app, held = serving(tmp_path)
    with TestClient(app) as client:
        client.put("/v1/galleries/shop")
        client.put("/v1/galleries/photos", json={"keep_images": True})
        add(client, {"id": "red", "input": RED})
        add(client, {"id": "red", "input": RED}, {"id": "blue", "input": BLUE}, gallery="photos")
        held.current = Later()
        status, code, _, message = error(client.post("/v1/search", json={"gallery": "shop", "query": RED}))
        assert (status, code) == (409, "gallery_of_another_model")
        assert "embedded by colour@7, and colour@8 is served" in message
        assert "python -m serve.gallery rebuild shop" in message
        assert error(client.post("/v1/galleries/shop/rebuild"))[:2] == (409, "gallery_of_another_model")

        wanted = {"gallery": "photos", "query": RED, "k": 1}
        answer = client.post("/v1/search", json=wanted)
        assert error(answer)[:2] == (503, "gallery_reembedding")
        assert "Retry-After" in answer.headers
        deadline = time.monotonic() + 20
        while answer.status_code == 503 and time.monotonic() < deadline:
            time.sleep(0.05)
            answer = client.post("/v1/search", json=wanted)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["model"], answer.json()["data"][0]["id"]) == ("colour@8", "red")
        assert answer.json()["data"][0]["distance"] == 0.0
        assert client.get("/v1/galleries/photos").json()["model"] == "colour@8"

        held.current = Calibrated()
        answer = client.post("/v1/galleries/photos/rebuild")
        assert answer.status_code == 202
        while client.get("/v1/galleries/photos").json()["model"] == "colour@8" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.post("/v1/search", json=wanted).json()["model"] == "colour@7"


def test_a_model_that_comes_and_goes_embeds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While replicas change over one by one, requests reach old and new ones in turn."""
    monkeypatch.setattr("serve.gallery.reembed.SETTLE_S", 0.3)
    app, held = serving(tmp_path)
    with TestClient(app) as client:
        client.put("/v1/galleries/shop", json={"keep_images": True})
        add(client, {"id": "red", "input": RED})
        present, held.current = held.current, Later()
        assert error(client.post("/v1/search", json={"gallery": "shop", "query": RED}))[0] == 503
        held.current = present
        asyncio.run(asyncio.sleep(0.6))
        info = client.get("/v1/galleries/shop").json()
        assert (info["model"], info["reembedding"]) == ("colour@7", None)
        assert search(client, RED)["data"][0]["distance"] == 0.0
