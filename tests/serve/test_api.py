"""The API's edges, on the real app with a dummy model: the shapes of answers, and what is refused and how."""

import base64
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from dml.metrics.operating_points import OperatingPoint
from serve import api
from serve.calibration import Calibration
from serve.engine import FAILURES
from serve.limits import Limits
from tests.serve.pictures import Held, MeanColour, data_uri, noise, png

LIMITS = Limits(images=3, image_bytes=20_000, request_bytes=100_000, pixels=10_000, aspect=20)
RED, BLUE = data_uri(png((255, 0, 0))), data_uri(png((0, 0, 255)))


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(api.build(Held(MeanColour()), LIMITS, threads=2)) as client:
        yield client


def embed(client: TestClient, **body: Any) -> Any:
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def error(answer: Any) -> dict[str, Any]:
    """The error of an answer; every one has these four fields and nothing else."""
    assert set(answer.json()) == {"error"}
    detail: dict[str, Any] = answer.json()["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    assert "/work" not in answer.text
    assert len(answer.text) < 1000, "an error does not echo the image"
    return detail


def test_the_answer_has_the_openai_shape_and_names_the_version(client: TestClient) -> None:
    answer = embed(client, model="colour", input=[RED, BLUE], user="someone")
    assert answer == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [1.0, 0.0, 0.0]},
            {"object": "embedding", "index": 1, "embedding": [0.0, 0.0, 1.0]},
        ],
        "model": "colour@7",
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }


@pytest.mark.parametrize(
    "given",
    [
        RED,
        [RED],
        base64.b64encode(png()).decode(),
        "\n".join(RED[at : at + 76] for at in range(0, len(RED), 76)),
        data_uri(png(kind="JPEG"), "image/jpeg"),
        data_uri(png(kind="GIF"), "IMAGE/GIF; charset=x"),
        data_uri(png(kind="BMP"), "image/png"),
    ],
    ids=["string", "list", "bare base64", "base64 in lines", "jpeg", "media type with parameters", "wrong media type"],
)
def test_every_way_to_send_an_image(client: TestClient, given: Any) -> None:
    np.testing.assert_allclose(embed(client, input=given)["data"][0]["embedding"], [1, 0, 0], atol=0.01)


@pytest.mark.parametrize(
    "sent",
    [
        {"json": {"input": [RED, BLUE]}},
        {"files": [("input", ("a.png", png((255, 0, 0)))), ("input", png((0, 0, 255), kind="BMP"))]},
        {"files": [("input", png((0, 0, 255)))], "data": {"input": RED}},
    ],
    ids=["json", "files", "a file and a data URI"],
)
def test_json_and_forms_are_answered_alike(client: TestClient, sent: dict[str, Any]) -> None:
    answer = client.post("/v1/embeddings", **sent)
    assert [item["embedding"] for item in answer.json()["data"]] == [[1, 0, 0], [0, 0, 1]]
    assert (answer.headers["x-onethreshold-model"], answer.headers["x-onethreshold-images"]) == ("colour@7", "2")


def test_an_image_alone_is_a_body_too(client: TestClient) -> None:
    answer = client.post("/v1/embeddings", content=png((0, 0, 255)), headers={"Content-Type": "image/png"})
    assert [item["embedding"] for item in answer.json()["data"]] == [[0, 0, 1]]


def test_the_fields_of_a_form_are_checked_as_those_of_json(client: TestClient) -> None:
    files = [("input", png())]
    packed = client.post("/v1/embeddings", files=files, data={"encoding_format": "base64", "dimensions": "3"})
    assert packed.json()["data"][0]["embedding"] == base64.b64encode(np.float32([1, 0, 0]).tobytes()).decode()
    for data, says in (
        ({"dimensions": "2"}, "colour@7 has 3"),
        ({"dimensions": "many"}, "dimensions"),
        ({"surprise": "1"}, "unknown field 'surprise'; valid: "),
        ({"model": ["colour", "colour"]}, "model"),
    ):
        answer = client.post("/v1/embeddings", files=files, data=data)
        assert answer.status_code in (400, 422)
        assert says in error(answer)["message"]
    answer = client.post("/v1/embeddings", files=files * 4)
    assert (answer.status_code, error(answer)["code"]) == (413, "too_many_images")
    answer = client.post("/v1/embeddings", files=[*files, ("model", png())])
    assert "model is a file; send it as text" in error(answer)["message"]


def test_an_array_is_the_same_numbers_in_one_file(client: TestClient) -> None:
    answer = client.post("/v1/embeddings", json={"input": [RED, BLUE]}, headers={"Accept": "application/x-npy"})
    assert answer.headers["content-type"] == "application/x-npy"
    rows = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, [[1, 0, 0], [0, 0, 1]])


def test_base64_is_the_same_numbers_as_little_endian_float32(client: TestClient) -> None:
    image = data_uri(png((10, 200, 90)))
    floats = embed(client, input=image)["data"][0]["embedding"]
    packed = embed(client, input=image, encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), np.float32(floats))


@pytest.mark.parametrize("extra", [{"model": "colour"}, {"model": "colour@7"}, {"model": None}, {"dimensions": 3}])
def test_what_clients_may_add(client: TestClient, extra: dict[str, Any]) -> None:
    assert embed(client, input=RED, **extra)["model"] == "colour@7"


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises far more pixels than it holds."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    chunks = b""
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        chunks += len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "says"),
    [
        ({"input": "a photo of a cat"}, 400, "not_base64", "input[0]", "embeds images, not text"),
        ({"input": [RED, "%%%"]}, 400, "not_base64", "input[1]", "base64"),
        ({"input": "data:image/png;base64,abc"}, 400, "not_base64", "input[0]", "base64"),
        ({"input": "data:image/png,abc"}, 400, "not_base64", "input[0]", "data:image/png;base64"),
        ({"input": "\ud83d"}, 400, "invalid_json", None, "hex escape"),
        ({"input": "\u00e9"}, 400, "not_base64", "input[0]", "base64"),
        ({"input": "https://example.com/a.png"}, 400, "url_not_fetched", "input[0]", "not fetched"),
        ({"input": "file:///etc/passwd"}, 400, "url_not_fetched", "input[0]", "not fetched"),
        ({"input": ""}, 400, "empty_image", "input[0]", "empty"),
        ({"input": "data:image/png;base64,"}, 400, "empty_image", "input[0]", "empty"),
        ({"input": data_uri(b"hello", "text/plain")}, 415, "not_an_image", "input[0]", "'text/plain'"),
        ({"input": "data:;base64,aGVsbG8="}, 415, "not_an_image", "input[0]", "image/png"),
        ({"input": data_uri(b"hello")}, 422, "unreadable_image", "input[0]", "PNG"),
        ({"input": data_uri(noise(0)[:900])}, 422, "unreadable_image", "input[0]", "unreadable"),
        ({"input": data_uri(bomb(60_000, 60_000))}, 413, "too_many_pixels", "input[0]", "10,000"),
        ({"input": data_uri(bomb(3000, 3))}, 422, "image_too_elongated", "input[0]", "factor of 20"),
        ({"input": data_uri(noise(0, size=(200, 120)))}, 413, "image_too_large", "input[0]", "20,000 bytes"),
        ({"input": [RED] * 4}, 413, "too_many_images", "input", "at most 3"),
        ({"input": [RED] * 2000}, 413, "request_too_large", None, "100,000 bytes"),
        ({"input": []}, 422, "invalid_request", "input", "at least 1"),
        ({"input": [1, 2, 3]}, 422, "invalid_request", "input[0]", "string"),
        ({"input": None}, 422, "invalid_request", "input", "array"),
        ({}, 422, "invalid_request", "input", "required"),
        ([], 422, "invalid_request", None, "object"),
        ({"input": RED, "encoding": "float"}, 422, "invalid_request", None, "'encoding'; valid: encoding_format"),
        ({"input": RED, "encoding_format": "hex"}, 422, "invalid_request", "encoding_format", "'float' or 'base64'"),
        ({"input": RED, "model": "color"}, 404, "model_not_found", "model", "valid: colour, colour@7"),
        ({"input": RED, "model": "colour@6"}, 404, "model_not_found", "model", "colour@7"),
        ({"input": RED, "model": "\u0000"}, 404, "model_not_found", "model", "valid: colour"),
        ({"input": RED, "\u0000": 1}, 422, "invalid_request", None, "unknown field"),
        ({"input": RED, "dimensions": 2}, 400, "dimensions_not_offered", "dimensions", "colour@7 has 3"),
        ({"input": RED, "dimensions": float("nan")}, 422, "invalid_request", "dimensions", "finite"),
    ],
)
def test_bad_input_is_refused_in_words(
    client: TestClient, body: Any, status: int, code: str, param: str | None, says: str
) -> None:
    answer = client.post("/v1/embeddings", content=json.dumps(body), headers={"Content-Type": "application/json"})
    detail = error(answer)
    assert (answer.status_code, detail["code"], detail["param"]) == (status, code, param), detail
    assert detail["type"] == "invalid_request_error"
    assert says in detail["message"]


@pytest.mark.parametrize(
    ("content", "media", "status", "says"),
    [
        (b'{"input": ', "application/json", 400, "no JSON"),
        (b"\xff\xfe\x00", "application/json", 400, "body"),
        (b"[" * 50_000, "application/json", 400, "body"),
        (b"", "application/json", 400, "no JSON"),
        (b'{"input": "x"}', "application/x-www-form-urlencoded", 415, "valid: application/json, multipart/form-data"),
        (b'{"input": "x"}', "", 415, "valid: application/json"),
        (png(), "application/octet-stream", 415, "image/*"),
        (b"", "image/png", 400, "input[0] is empty"),
        (b"x", "image/png", 422, "input[0] is unreadable"),
        (b"x" * 20_001, "image/png", 413, "input[0] is longer than 20,000 bytes"),
        (b"--", "multipart/form-data", 400, "boundary"),
        (b"--x\r\n\r\n", "multipart/form-data; boundary=x", 400, "Content-Disposition"),
        (b"", "multipart/form-data; boundary=x", 422, "input: Field required"),
    ],
    ids=[
        "cut off", "no UTF-8", "deep", "empty", "urlencoded", "no media type", "octets", "no image", "text",
        "a large image", "no boundary", "a part without a name", "no part",
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read_is_refused(
    client: TestClient, content: bytes, media: str, status: int, says: str
) -> None:
    answer = client.post("/v1/embeddings", content=content, headers={"Content-Type": media} if media else {})
    assert says in error(answer)["message"]
    assert answer.status_code == status


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/verify"])
def test_json_of_too_many_values_is_refused_unparsed(client: TestClient, path: str) -> None:
    kind = {"Content-Type": "application/json"}
    for body in (b'{"a":[' + b"0," * 33_000, b'{"input":["",' + b'"",' * 33_000):
        answer = client.post(path, content=body, headers=kind)
        assert (answer.status_code, error(answer)["code"]) == (413, "too_many_values"), answer.text
        assert "; at most 32,780 values" in error(answer)["message"]
    longest = [0] * 16_384
    answer = client.post("/v1/verify", json={"a": longest, "b": longest, "far": 0.01})
    assert "too_many_values" not in answer.text
    assert client.post(path, content=b"{" + b"," * 1000, headers=kind).status_code == 400


def test_unknown_paths_and_methods_have_the_same_shape(client: TestClient) -> None:
    for answer, status in ((client.get("/v1/nothing"), 404), (client.get("/v1/embeddings"), 405)):
        assert answer.status_code == status
        error(answer)


def test_health_readiness_and_models(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = {"status": "ready", "model": "colour@7", "name": "colour", "version": "7", "dim": 3, "image_size": 8}
    assert client.get("/readyz").json() == {**ready, "note": None}
    [card] = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["version"], card["dim"]) == ("colour", "model", "7", 3)
    assert (card["alias"], card["operating_points"], card["calibration"]) == (None, [], None)
    assert card["metrics"] == {"test/opis": 0.25}


def test_trouble_beside_a_model_is_told_but_does_not_make_it_unready() -> None:
    with TestClient(api.build(Held(MeanColour(), "the model registry cannot be reached"))) as client:
        answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["note"]) == (200, "the model registry cannot be reached")


def test_models_show_the_operating_points() -> None:
    point = OperatingPoint(far_target=0.01, threshold=0.8, far=0.009, frr=0.1, negatives=900, positives=100)
    model = MeanColour()
    model.calibration = Calibration.of([asdict(point)])
    with TestClient(api.build(Held(model))) as client:
        [card] = client.get("/v1/models").json()["data"]
    assert [OperatingPoint(**each) for each in card["operating_points"]] == [point]
    assert card["calibration"] == model.calibration.id


@pytest.mark.parametrize(
    ("trouble", "says"), [(None, "python -m tune.search"), ("the model registry cannot be reached", "registry")]
)
def test_without_a_champion_the_service_lives_but_is_not_ready(trouble: str | None, says: str) -> None:
    with TestClient(api.build(Held(None, trouble), LIMITS)) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/v1/models").json() == {"object": "list", "data": []}
        for answer in (client.get("/readyz"), client.post("/v1/embeddings", json={"input": RED})):
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert error(answer)["code"] == "no_champion"
            assert error(answer)["message"].startswith("no champion yet")
            assert says in error(answer)["message"]


def test_a_failing_model_is_a_500_without_a_trace() -> None:
    class Broken(MeanColour):
        def embed(self, inputs: Any) -> Any:
            raise RuntimeError("secret /work/path")

    with TestClient(api.build(Held(Broken()), LIMITS), raise_server_exceptions=False) as client:
        answer = client.post("/v1/embeddings", json={"input": RED})
        assert answer.status_code == 500
        assert "secret" not in json.dumps(error(answer))


def test_a_replica_whose_model_fails_again_and_again_is_unwell() -> None:
    class Broken(MeanColour):
        def embed(self, inputs: Any) -> Any:
            raise RuntimeError("the device is lost")

    app = api.build(Held(Broken()), LIMITS)
    with TestClient(app, raise_server_exceptions=False) as client:
        for _ in range(FAILURES):
            app.state.engine.check()
            assert client.post("/v1/embeddings", json={"input": RED}).status_code == 500
        with pytest.raises(RuntimeError, match="failed 5 times in a row"):
            app.state.engine.check()
