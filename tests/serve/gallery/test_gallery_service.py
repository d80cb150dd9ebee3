"""Galleries of a running service: Ray Serve on a real port, two clients at once, a restart, and the command line."""

import concurrent.futures
import datetime
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pytest

from cluster import embedding_table
from cluster.embedding_table import Made
from serve import app
from serve.client import Client, NotFoundError
from serve.gallery import __main__ as command
from serve.gallery.lock import FolderLock, WrittenElsewhereError
from tests.serve.gallery.rows import Row, units
from tests.serve.pictures import data_uri, noise, offline, write_checkpoint
from tests.serve.test_service import wait_for
from tests.servers import free_port


@dataclass(frozen=True)
class Service:
    url: str
    store: Path
    model: Path

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = httpx.request(method, f"{self.url}{path}", json=body, timeout=60)
        assert answer.is_success, answer.text
        return answer.json()

    def search(self, gallery: str, query: Any, **more: Any) -> Any:
        return self.ask("POST", "/v1/search", {"gallery": gallery, "query": query, **more})


@pytest.fixture(scope="module")
def service(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    import ray.serve

    folder = tmp_path_factory.mktemp("galleries")
    model = write_checkpoint(folder / "first", seed=1)
    url = app.start(app.Options(port=free_port(), model=str(model), poll=0.2, galleries=str(folder / "store")))
    wait_for(lambda: httpx.get(f"{url}/readyz", timeout=30).status_code == 200)
    yield Service(url, folder / "store", model)
    ray.serve.shutdown()


def test_images_are_found_by_what_the_model_makes_of_them(service: Service) -> None:
    files = [noise(seed) for seed in range(6)]
    service.ask("PUT", "/v1/galleries/photos", {"keep_images": True})
    items = [{"id": f"{n}.png", "input": data_uri(data), "metadata": {"n": n}} for n, data in enumerate(files)]
    assert service.ask("POST", "/v1/galleries/photos/items", {"items": items})["added"] == 6
    rows = offline(service.model, files)
    found = service.search("photos", data_uri(files[2]), threshold=0.5)
    expected = np.linalg.norm(rows - rows[2], axis=1)
    assert [each["metadata"]["n"] for each in found["data"]] == np.argsort(expected, kind="stable").tolist()
    np.testing.assert_allclose([each["distance"] for each in found["data"]], np.sort(expected), atol=1e-4)
    assert found["model"] == "onethreshold@first"
    refused = httpx.post(f"{service.url}/v1/search", json={"gallery": "none", "query": rows[0].tolist()})
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "gallery_not_found"


def test_two_clients_at_once_lose_nothing(service: Service) -> None:
    """Each adds its own items, both write the same ones, and one deletes what the other has not touched."""
    service.ask("PUT", "/v1/galleries/shared")
    rows = units(400, 16)

    def client(which: int) -> None:
        with httpx.Client(base_url=service.url, timeout=60) as http:
            for step in range(20):
                items = [
                    {"id": f"own-{which}-{step}", "input": rows[20 * which + step].tolist()},
                    {"id": f"shared-{step}", "input": rows[100 + step].tolist(), "metadata": {"by": which}},
                    {"id": f"gone-{which}-{step}", "input": rows[200 + step].tolist()},
                ]
                assert http.post("/v1/galleries/shared/items", json={"items": items}).status_code == 200
                assert http.delete(f"/v1/galleries/shared/items/gone-{which}-{step}").status_code == 200
                found = http.post(
                    "/v1/search", json={"gallery": "shared", "query": items[0]["input"], "k": 1, "threshold": 1}
                )
                assert found.json()["data"][0]["id"] == f"own-{which}-{step}", "what was acknowledged is found"

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(client, range(2)))
    page = service.ask("GET", "/v1/galleries/shared/items?limit=200")
    assert {each["id"] for each in page["data"]} == {
        *(f"own-{which}-{step}" for which in range(2) for step in range(20)),
        *(f"shared-{step}" for step in range(20)),
    }
    for step in range(20):
        assert service.search("shared", rows[100 + step].tolist(), k=1, threshold=1)["data"][0]["distance"] < 1e-6


def test_the_client_of_the_package_does_it_all(service: Service) -> None:
    rows = units(70, 16, seed=4)
    with Client(service.url) as client:
        assert client.create_gallery("client").items == 0
        assert client.add("client", [(f"dir/{n}", row, {"n": n}) for n, row in enumerate(rows)]) == 70
        found = client.search("client", rows[3], k=2, threshold=0.1)
        assert [each["id"] for each in client.items("client", after="dir/7", limit=2)] == ["dir/8", "dir/9"]
        assert (found.model, len(found.data), found.data[0].id, found.data[0].metadata) == (
            "onethreshold@first", 2, "dir/3", {"n": 3},
        )  # fmt: skip
        assert (found.data[0].match, found.data[1].match) == (True, False)
        client.add("client", [("plain", -rows[3])])
        assert client.search("client", -rows[3], k=1, threshold=0.1).data[0].metadata == {}
        client.delete_item("client", "plain")
        client.delete_item("client", "dir/3")
        assert client.gallery("client").items == 69
        assert "client" in [each.name for each in client.galleries()]
        client.delete_gallery("client")
        with pytest.raises(NotFoundError, match="unknown gallery 'client'"):
            client.gallery("client")


def made(path: Path, rows: Row, model: str) -> Path:
    import pyarrow.parquet as pq

    told = Made(model, rows.shape[1], "w", "d", len(rows), 100)
    labels = [f"class {n % 3}" if n % 2 else None for n in range(len(rows))]
    pq.write_table(embedding_table.table(told, [f"a/{n}.png" for n in range(len(rows))], labels, rows), path)
    return path


def test_a_gallery_is_built_from_a_file_of_embeddings(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = units(1200, 16, seed=3)
    file = made(tmp_path / "emb.parquet", rows, "onethreshold@first")
    url = ["--url", service.url]
    assert command.main(["build", "--from", str(file), "--name", "built", *url]) == 0
    assert "1,200 embeddings by onethreshold@first" in capsys.readouterr().out
    found = service.search("built", rows[7].tolist(), k=1, threshold=1)["data"]
    assert found[0]["distance"] < 1e-6
    assert (found[0]["id"], found[0]["metadata"]) == ("a/7.png", {"label": "class 1"})
    assert command.main(["list", *url]) == 0
    assert "1,200" in capsys.readouterr().out

    other = made(tmp_path / "other.parquet", rows, "onethreshold@second")
    for words in (["build", "--name", "built", "--from", str(other)], ["rebuild", "built", "--from", str(other)]):
        with pytest.raises(SystemExit) as stopped:
            command.main([*words, *url])
        assert stopped.value.code == 2
        told = capsys.readouterr().err
        assert "embeddings of onethreshold@second, and" in told
        assert "serves onethreshold@first" in told
        assert len(told.splitlines()) == 1
    fewer = made(tmp_path / "fewer.parquet", rows[:10], "onethreshold@first")
    assert command.main(["rebuild", "built", "--from", str(fewer), *url]) == 0
    assert service.ask("GET", "/v1/galleries/built")["items"] == 10
    assert command.main(["delete", "built", *url]) == 0
    assert httpx.get(f"{service.url}/v1/galleries/built").status_code == 404


def test_a_file_of_another_dimension_deletes_nothing(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.ask("PUT", "/v1/galleries/wide")
    items = [{"id": "a", "input": units(1, 16)[0].tolist()}]
    service.ask("POST", "/v1/galleries/wide/items", {"items": items})
    file = made(tmp_path / "emb.parquet", units(3, 8), "onethreshold@first")
    with pytest.raises(SystemExit):
        command.main(["rebuild", "wide", "--from", str(file), "--url", service.url])
    assert "these embeddings have 8 numbers, and those of onethreshold@first 16" in capsys.readouterr().err
    assert service.ask("GET", "/v1/galleries/wide")["items"] == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"id": ["a", "b\nc", "c"]}, "id 'b\\nc': an id has no control characters"),
        ({"id": ["a", "b", "a"]}, "the id 'a' comes 2 times"),
        ({"embedding": [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]}, "id 'b': its embedding has the norm 0"),
        ({"embedding": [[1.0, 0.0], [0.0, 1.0], [1.0, float("nan")]]}, "id 'c': its embedding has the norm nan"),
        ({"price": [1.0, float("inf"), 2.0]}, "id 'b': metadata has a number that JSON cannot say"),
        ({"made": [None, None, datetime.date(2026, 1, 2)]}, "id 'c': metadata cannot be said in JSON"),
        ({"text": ["", "x" * 4097, ""]}, "id 'b': its metadata is longer than 4,096 bytes"),
    ],
)
def test_a_file_that_cannot_be_taken_whole_deletes_nothing(
    wrong: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"id": ["a", "b", "c"], "embedding": [[1.0, 0.0]] * 3}
    pq.write_table(pa.table(columns), tmp_path / "good")
    pq.write_table(pa.table(columns | wrong), tmp_path / "wrong")
    store = ["--made-by", "m@1", "--store", str(tmp_path)]
    assert command.main(["build", "--from", str(tmp_path / "good"), "--name", "shop", *store]) == 0
    before = (tmp_path / "shop" / "items.log").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command.main(["rebuild", "shop", "--from", str(tmp_path / "wrong"), *store])
    told = capsys.readouterr().err
    assert says in told
    assert len(told.splitlines()) == 1
    assert (tmp_path / "shop" / "items.log").read_bytes() == before


def test_shards_of_two_dimensions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parts").mkdir()
    for number, dim in enumerate((8, 4)):
        made(tmp_path / "parts" / embedding_table.SHARD.format(number), units(2, dim), "m@1")
    with pytest.raises(SystemExit):
        command.main(["build", "--from", str(tmp_path / "parts"), "--name", "shop", "--store", str(tmp_path)])
    assert "embeddings must be of one length, got 8 and 4" in capsys.readouterr().err
    assert not (tmp_path / "shop").exists()


@pytest.mark.parametrize(
    "name", ["Screenshot 3.04.05\u202fPM.png", "a\u00a0b", "\u3000", "\U0001f469\u200d\U0001f4bb.png"]
)
def test_what_files_are_called_can_be_an_id(name: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": [name], "embedding": [[1.0, 0.0]]}), tmp_path / "table")
    words = ["build", "--from", str(tmp_path / "table"), "--name", "a", "--made-by", "m@1", "--store", str(tmp_path)]
    assert command.main(words) == 0


def test_the_folder_of_a_running_service_is_left_alone(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["list", "--store", str(service.store)])
    assert "is written by process" in capsys.readouterr().err
    from serve.gallery.galleries import Galleries

    with pytest.raises(WrittenElsewhereError):
        Galleries(service.store)


@pytest.mark.slow
def test_galleries_survive_the_death_of_their_process(service: Service) -> None:
    """Another process has the folder for a while, as the old cluster has beside the new one."""
    import ray
    import ray.serve

    service.ask("PUT", "/v1/galleries/lasting")
    rows = units(20, 16, seed=9)
    items = [{"id": f"{n}", "input": row.tolist()} for n, row in enumerate(rows)]
    service.ask("POST", "/v1/galleries/lasting/items", {"items": items})

    def replicas() -> list[Any]:
        return [each for each in ray.util.list_named_actors(all_namespaces=True) if "Galleries" in each["name"]]

    [actor] = replicas()
    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
    lock = FolderLock(service.store, patience=30)
    wanted = {"gallery": "lasting", "query": rows[3].tolist(), "k": 1, "threshold": 1}

    def asked() -> httpx.Response:
        return httpx.post(f"{service.url}/v1/search", json=wanted, timeout=60)

    def replaced() -> bool:
        [application] = ray.serve.status().applications.values()
        return application.deployments["Galleries"].status == "HEALTHY" and replicas() not in ([], [actor])

    wait_for(replaced)
    answer = asked()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "galleries_unavailable")
    lock.release()
    deadline = time.monotonic() + 60
    while (answer := asked()).status_code != 200:
        assert answer.status_code == 503, answer.text
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.2)
    assert answer.json()["data"][0]["id"] == "3"
    assert service.ask("GET", "/v1/galleries/lasting")["items"] == 20


def test_a_folder_without_a_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built, listed, embedded anew by another model, and deleted, all offline."""
    import asyncio

    from serve.gallery.galleries import Galleries
    from serve.gallery.items import Item

    folder = tmp_path / "store"
    folder.mkdir()
    store = ["--store", str(folder)]
    rows = units(30, 16)
    file = made(tmp_path / "emb.parquet", rows, "onethreshold@one")
    assert command.main(["build", "--from", str(file), "--name", "shop", *store]) == 0
    assert command.main(["list", *store]) == 0
    assert "onethreshold@one" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["rebuild", "shop", "--model", str(write_checkpoint(tmp_path / "two", seed=2)), *store])
    assert "30 of its 30 items have no kept image" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    before = mlflow.get_tracking_uri()
    with pytest.raises(SystemExit):
        command.main(["rebuild", "shop", "--model", "models:/nobody@champion", *store])
    mlflow.set_tracking_uri(before)
    assert capsys.readouterr().err == "error: MLflow at http://127.0.0.1:9: does not answer (Connection refused)\n"

    files = [noise(seed) for seed in range(20)]

    async def fill() -> None:
        galleries = Galleries(folder)
        await galleries.create("photos", True)
        await galleries.add("photos", "onethreshold@one", [Item(f"{n}", rows[n], image=f) for n, f in enumerate(files)])
        await galleries.close()

    asyncio.run(fill())
    assert command.main(["rebuild", "photos", "--model", str(tmp_path / "two"), *store]) == 0
    assert "photos is now one of the present model" in capsys.readouterr().out
    assert command.main(["rebuild", "photos", "--model", str(tmp_path / "two"), *store]) == 0
    assert "was already" in capsys.readouterr().out

    async def look() -> None:
        galleries = Galleries(folder)
        expected = offline(tmp_path / "two", files)
        [found] = await galleries.search("photos", "onethreshold@two", expected[5], 1)
        assert (found.id, found.distance < 1e-5) == ("5", True)
        await galleries.close()

    asyncio.run(look())
    assert command.main(["delete", "shop", *store]) == 0
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == ["photos"]


def test_the_rebuild_command_waits_for_the_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import threading

    import uvicorn

    from serve import api
    from serve.gallery.galleries import Galleries
    from tests.serve.gallery.test_routes import BLUE, RED, Calibrated, Later
    from tests.serve.pictures import Held

    held, port = Held(Calibrated()), free_port()
    app_of_both = api.build(held, galleries=Galleries(tmp_path))
    server = uvicorn.Server(uvicorn.Config(app_of_both, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        service = Service(f"http://127.0.0.1:{port}", tmp_path, tmp_path)
        service.ask("PUT", "/v1/galleries/photos", {"keep_images": True})
        items = [{"id": name, "input": image} for name, image in (("red", RED), ("blue", BLUE))]
        service.ask("POST", "/v1/galleries/photos/items", {"items": items})
        words = ["rebuild", "photos", "--url", service.url]
        assert command.main(words) == 0
        assert "was already one of the present model" in capsys.readouterr().out
        held.current = Later()
        assert command.main(words) == 0
        assert "is now one of the present model" in capsys.readouterr().out
        found = service.search("photos", RED, k=1)
        assert (found["model"], found["data"][0]["id"]) == ("colour@8", "red")
        service.ask("POST", "/v1/galleries/photos/items", {"items": [{"id": "green", "input": [0, 1, 0]}]})
        held.current = Calibrated()
        with pytest.raises(SystemExit):
            command.main(words)
        assert "1 of its 3 items have no kept image" in capsys.readouterr().err
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["list", "--url", "http://127.0.0.1:9"], "cannot be reached"),
        (["list", "--store", "/no/such/folder"], "/no/such/folder is not a folder"),
        (["build", "--name", "a", "--from", "{absent}", "--store", "{here}"], "no Parquet file"),
        (["build", "--name", "a", "--from", "{text}", "--store", "{here}"], "no Parquet file"),
        (["build", "--name", "a", "--from", "{plain}", "--store", "{here}"], "--made-by"),
        (
            ["build", "--name", "A", "--from", "{plain}", "--made-by", "m@1", "--store", "{here}"],
            "no name of a gallery",
        ),
        (["build", "--name", "a", "--from", "{wrong}", "--made-by", "m@1", "--store", "{here}"], "no column 'id'"),
        (["rebuild", "nobody", "--model", "x", "--store", "{here}"], "x"),
        (["delete", "nobody", "--store", "{here}"], "unknown gallery 'nobody'"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "text").write_text("no table")
    pq.write_table(pa.table({"id": ["a"], "embedding": [[1.0, 0.0]]}), tmp_path / "plain")
    pq.write_table(pa.table({"name": ["a"], "embedding": [[1.0, 0.0]]}), tmp_path / "wrong")
    (tmp_path / "here").mkdir()
    paths = {name: str(tmp_path / name) for name in ("text", "plain", "wrong", "here", "absent")}
    with pytest.raises(SystemExit) as stopped:
        command.main([word.format(**paths) for word in words])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert says in told
    assert len(told.splitlines()) == 1
