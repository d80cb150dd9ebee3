"""The API against its own OpenAPI document: whatever fits or nearly fits it is answered without a 5xx."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings

from serve import api
from serve.limits import Limits
from tests.serve.pictures import Held, MeanColour


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(
        api.build(Held(MeanColour()), Limits(requests_per_second=1e6)), raise_server_exceptions=False
    ) as made:
        yield made


@pytest.fixture(scope="module")
def document(client: TestClient) -> Any:
    return schemathesis.openapi.from_dict(client.get("/openapi.json").json())


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_nothing_is_a_5xx(case: Any, client: TestClient) -> None:
    answer = client.request(**case.as_transport_kwargs(base_url="http://testserver"))
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()) == {"error"}


def test_every_route_and_its_errors_are_documented(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    body = paths["/v1/embeddings"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data", "image/*"}
    assert set(paths["/v1/embeddings"]["post"]["responses"]["200"]["content"]) == {
        "application/json",
        "application/x-npy",
    }
    for path in ("/v1/embeddings", "/v1/models", "/readyz"):
        for operation in paths[path].values():
            assert {"401", "429", "503"} <= set(operation["responses"])
