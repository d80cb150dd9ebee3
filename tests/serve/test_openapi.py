"""The API against its own OpenAPI document: whatever fits or nearly fits it is answered without a 5xx."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from serve import api
from serve.gallery.galleries import Galleries
from serve.limits import Limits
from tests.serve.pictures import Held, MeanColour

UNHEALTHY = list(HealthCheck)  # its strategies are slow, and what they make is large


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    galleries = Galleries(tmp_path_factory.mktemp("galleries"))
    app = api.build(Held(MeanColour()), Limits(requests_per_second=1e6), galleries=galleries)
    with TestClient(app) as made:
        made.put("/v1/galleries/0")
        yield made


@pytest.fixture(scope="module")
def document(client: TestClient) -> Any:
    return schemathesis.openapi.from_dict(client.get("/openapi.json").json())


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_nothing_is_a_5xx(mode: GenerationMode, document: Any, client: TestClient) -> None:
    """Of every route: requests that fit the document, and requests that do not."""
    for each in document.get_all_operations():
        operation = each.ok()

        @settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=UNHEALTHY)
        @given(case=operation.as_strategy(generation_mode=mode))
        def answered(case: Any) -> None:
            made = requests.Request(**case.as_transport_kwargs(base_url="http://testserver")).prepare()
            body = made.body.encode() if isinstance(made.body, str) else made.body
            answer = client.request(made.method or "", made.url or "", content=body, headers=dict(made.headers))
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert set(answer.json()) == {"error"}

        with contextlib.suppress(Unsatisfiable):  # a route that takes nothing cannot be sent anything wrong
            answered()


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
            assert operation["security"] == [{"HTTPBearer": []}]
            assert {"401", "429", "503"} <= set(operation["responses"])
