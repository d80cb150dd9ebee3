"""POST /v1/verify, GET /v1/calibration and GET /v1/drift on the real app, with a model whose distances are known."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from dml.metrics.distance_histograms import BINS
from dml.metrics.drift import ENOUGH
from serve import api
from serve.limits import Limits
from serve.live import EVERY, WINDOW, Live
from tests.serve.calibrated import calibration, colour, distances
from tests.serve.pictures import Held, data_uri, png

LIMITS = Limits(images=3, image_bytes=20_000, request_bytes=100_000, pixels=10_000, aspect=20)
RED, PINK, BLUE = (data_uri(png(rgb)) for rgb in ((255, 0, 0), (255, 64, 0), (0, 0, 255)))
CALIBRATION = calibration()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(api.build(Held(colour(CALIBRATION)), LIMITS, threads=2)) as client:
        yield client


@pytest.fixture
def uncalibrated() -> Iterator[TestClient]:
    with TestClient(api.build(Held(colour(None)), LIMITS, threads=2)) as client:
        yield client


def verify(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/verify", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_the_answer_says_how_far_apart_what_decided_and_by_whom(client: TestClient) -> None:
    found = verify(client, a=RED, b=BLUE, far=0.01)
    point = CALIBRATION.at(0.01)
    assert found == {
        "object": "verification",
        "match": False,
        "distance": pytest.approx(math.sqrt(2)),
        "similarity": pytest.approx(0, abs=1e-6),
        "threshold": point.threshold,
        "operating_point": {
            "far_target": 0.01,
            "threshold": point.threshold,
            "far": point.far,
            "frr": point.frr,
            "far_interval": [0.005, 0.02],
            "frr_interval": [point.frr / 2, point.frr * 2],
            "negatives": 60_000,
            "positives": 4000,
        },
        "calibration": CALIBRATION.id,
        "model": "colour@7",
    }
    near = verify(client, a=RED, b=PINK, far=0.01)
    assert near["match"]
    expected = math.dist((1, 0), (255 / math.hypot(255, 64), 64 / math.hypot(255, 64)))
    assert near["distance"] == pytest.approx(expected, abs=0.01)


def test_an_image_and_itself_are_exactly_the_same(client: TestClient) -> None:
    found = verify(client, a=RED, b=RED, threshold=0)
    assert (found["match"], found["distance"], found["similarity"]) == (True, 0.0, 1.0)


def test_the_pair_may_be_given_in_either_order_and_as_embeddings(client: TestClient) -> None:
    expected = verify(client, a=RED, b=PINK)["distance"]
    assert verify(client, a=PINK, b=RED)["distance"] == pytest.approx(expected, abs=1e-6)
    assert verify(client, a=[3, 0, 0], b=PINK)["distance"] == pytest.approx(expected, abs=1e-6)
    opposite = verify(client, a=[1e-3, 0, 0], b=[-5e8, 0, 0], threshold=2)
    assert (opposite["distance"], opposite["similarity"], opposite["match"]) == (2.0, -1.0, True)


def test_what_decides_is_a_far_a_threshold_or_the_middle_point(client: TestClient) -> None:
    for far in (0.1, 0.01, 0.001):
        assert verify(client, a=RED, b=BLUE, far=far)["threshold"] == CALIBRATION.at(far).threshold
    own = verify(client, a=RED, b=BLUE, threshold=1.5)
    assert (own["match"], own["threshold"], own["operating_point"]) == (True, 1.5, None)
    assert verify(client, a=RED, b=BLUE)["operating_point"]["far_target"] == 0.01


def test_files_of_a_form_are_the_same_as_base64(client: TestClient) -> None:
    files = {"a": ("a.png", png((255, 0, 0)), "image/png"), "b": ("b.png", png((255, 64, 0)), "image/png")}
    found = client.post("/v1/verify", files=files, data={"far": "0.1"})
    assert found.status_code == 200, found.text
    assert found.json() == verify(client, a=RED, b=PINK, far=0.1)
    assert client.post("/v1/verify", files=files, data={"threshold": "0.5"}).json()["threshold"] == 0.5
    mixed = client.post("/v1/verify", files={"a": files["a"]}, data={"b": PINK})
    assert mixed.json()["distance"] == found.json()["distance"]


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "says"),
    [
        ({"a": RED}, 422, "invalid_request", "b", "required"),
        ({"a": RED, "b": None}, 422, "invalid_request", "b", "an embedding (a list of numbers)"),
        ({"a": RED, "b": []}, 422, "invalid_request", "b", "an image"),
        ({"a": RED, "b": [RED]}, 422, "invalid_request", "b", "an image"),
        ({"a": RED, "b": [True, 0, 0]}, 422, "invalid_request", "b", "a list of numbers"),
        ({"a": RED, "b": [[1, 0, 0]]}, 422, "invalid_request", "b", "a list of numbers"),
        ({"a": RED, "b": [10**400, 0, 0]}, 422, "invalid_request", "b", "too large"),
        ({"a": RED, "b": [1, 2]}, 422, "wrong_dimension", "b", "colour@7 has 3"),
        ({"a": [0, 0, 0], "b": RED}, 422, "not_an_embedding", "a", "not all 0"),
        ({"a": [float("nan"), 0, 0], "b": RED}, 422, "not_an_embedding", "a", "finite"),
        ({"a": [1e300, 1e300, 0], "b": RED}, 422, "not_an_embedding", "a", "finite"),
        ({"a": "https://example.com/a.png", "b": RED}, 400, "url_not_fetched", "a", "not fetched"),
        ({"a": RED, "b": data_uri(b"hello")}, 422, "unreadable_image", "b", "b is unreadable"),
        ({"a": RED, "b": BLUE, "far": 0.02}, 422, "far_not_calibrated", "far", "valid: 0.001, 0.01, 0.1"),
        ({"a": RED, "b": BLUE, "far": "half"}, 422, "invalid_request", "far", "number"),
        ({"a": RED, "b": BLUE, "threshold": 3}, 422, "not_a_distance", "threshold", "valid: 0 to 2"),
        ({"a": RED, "b": BLUE, "threshold": float("nan")}, 422, "not_a_distance", "threshold", "nan"),
        ({"a": RED, "b": BLUE, "threshold": 1, "far": 0.1}, 422, "far_and_threshold", "threshold", "one of them"),
        ({"a": RED, "b": BLUE, "model": "color"}, 404, "model_not_found", "model", "valid: colour"),
        ({"a": RED, "b": BLUE, "treshold": 1}, 422, "invalid_request", None, "'treshold'; valid: threshold"),
        ([RED, BLUE], 422, "invalid_request", None, "object"),
    ],
)
def test_bad_input_is_refused_in_words(
    client: TestClient, body: Any, status: int, code: str, param: str | None, says: str
) -> None:
    answer = client.post("/v1/verify", content=json.dumps(body), headers={"Content-Type": "application/json"})
    detail = answer.json()["error"]
    assert (answer.status_code, detail["code"], detail["param"]) == (status, code, param), detail
    assert says in detail["message"]
    assert len(answer.text) < 1000


def test_other_bodies_are_refused_with_the_valid_ones(client: TestClient) -> None:
    answer = client.post("/v1/verify", content=png(), headers={"Content-Type": "image/png"})
    assert answer.status_code == 415
    assert "valid: application/json, multipart/form-data" in answer.json()["error"]["message"]


def test_without_operating_points_a_threshold_decides(uncalibrated: TestClient) -> None:
    found = verify(uncalibrated, a=RED, b=BLUE, threshold=1.5)
    assert (found["match"], found["operating_point"], found["calibration"]) == (True, None, None)
    for body in ({}, {"far": 0.01}):
        answer = uncalibrated.post("/v1/verify", json={"a": RED, "b": BLUE, **body})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "not_calibrated")
    answer = uncalibrated.get("/v1/calibration")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_calibrated")
    drift = uncalibrated.get("/v1/drift").json()
    assert (drift["level"], drift["positives"], drift["distances"]) == (None, None, 1)


def test_the_calibration_in_use_is_told_with_its_histograms(client: TestClient) -> None:
    found = client.get("/v1/calibration").json()
    assert (found["id"], found["model"], found["source"]) == (CALIBRATION.id, "colour@7", "registered")
    assert [point["far_target"] for point in found["operating_points"]] == [0.001, 0.01, 0.1]
    assert found["default_far"] == 0.01
    shown = found["histograms"]
    assert len(shown["edges"]) == BINS + 1
    assert (sum(shown["positives"]), sum(shown["negatives"])) == (4000, 60_000)
    with TestClient(api.build(Held(colour(calibration(with_histograms=False))), LIMITS)) as without:
        assert without.get("/v1/calibration").json()["histograms"] is None


def test_drift_tells_what_this_replica_measured() -> None:
    with TestClient(api.build(Held(colour(CALIBRATION)), LIMITS, threads=2)) as client:
        before = client.get("/v1/drift").json()
        assert (before["level"], before["divergence"], before["distances"]) == (None, None, 0)
        for _ in range(3):
            verify(client, a=RED, b=BLUE)
        after = client.get("/v1/drift").json()
        assert (after["distances"], after["seen"], sum(after["live"])) == (3, 3, 3)
        assert after["live"][70] == 3, "sqrt(2) lies in the bin that ends at 1.42"
        assert (after["calibration"], after["model"], after["scope"]) == (CALIBRATION.id, "colour@7", "replica")
        for _ in range(ENOUGH):
            verify(client, a=[1, 0, 0], b=[-1, 0, 0])
        found = client.get("/v1/drift").json()
        assert found["level"] == "drifted"
        assert found["divergence"] > 0.5


def test_the_window_forgets_and_another_model_begins_anew() -> None:
    live, model = Live(), colour(CALIBRATION)
    for distance in distances(seed=3, count=WINDOW, share=0.3, shift=0.4):
        live.see(model, float(distance))
    drifted = live.against(model)
    assert drifted is not None
    assert drifted.level == "drifted"
    for distance in distances(seed=4, count=WINDOW, share=0.3):
        live.see(model, float(distance))
    stable = live.against(model)
    assert stable is not None
    assert (stable.level, live.counts_of(model).sum(), live.seen) == ("stable", WINDOW, 2 * WINDOW)
    assert stable.share == pytest.approx(0.3, abs=0.02)
    other = colour(CALIBRATION)
    other.version = "8"
    assert not live.counts_of(other).any()
    live.see(other, 1.0)
    assert (live.counts_of(other).sum(), live.seen) == (1, 1)
    assert not live.counts_of(model).any()
    assert EVERY < ENOUGH < WINDOW
