"""The README's backup and restore, line by line: PostgreSQL is real, and kubectl runs here what it would in a pod."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import bootstrap
from tests.k8s.here import Database, Here
from tests.k8s.manifests import FOLDER, Manifests
from tests.servers import free_port

pytestmark = pytest.mark.slow

KUBECTL = """#!/bin/bash -e
echo "$*" >> calls
if [[ " $* " != *" -- "* ]]; then exit; fi
while [ "$1" != -- ]; do shift; done
shift
exec "${@//\\/artifacts/artifacts}"
"""


class Cluster:
    """What is backed up and restored: PostgreSQL as its container and init script make it, and a folder."""

    def __init__(self, folder: Path, secrets: dict[str, dict[str, str]]) -> None:
        manifests, self._secrets = Manifests.read(), secrets["postgres"]
        self.here = Here(folder, secrets, {})
        container = manifests.get("StatefulSet", "postgres")["spec"]["template"]["spec"]["containers"][0]
        init = manifests.get("ConfigMap", "postgres")["data"]["init.sh"]
        self.postgres = Database(self.here, container, init, free_port())
        (folder / "artifacts").mkdir()

    def type(self, block: str) -> None:
        environment = self.postgres.environment
        self.here.run(["bash", "-e", "-c", block], environment | {"PATH": f"{self.here.folder}:{environment['PATH']}"})

    def query(self, user: str, text: str) -> str:
        return self.postgres.query(user, user, self._secrets[f"{user}-password"], text)

    def go(self) -> None:
        self.postgres.stop()
        shutil.rmtree(self.here.folder / "artifacts")


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Iterator[Cluster]]:
    """One after the other in the same folder, with the same Secrets."""
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    secrets = {name: bootstrap.values(name) for name in bootstrap.SECRETS}

    def made() -> Iterator[Cluster]:
        while True:
            cluster = Cluster(tmp_path, secrets)
            try:
                yield cluster
            finally:
                cluster.go()

    found = made()
    yield found
    found.close()


def test_what_was_backed_up_is_there_again(clusters: Iterator[Cluster], tmp_path: Path) -> None:
    section = (FOLDER / "README.md").read_text().partition("## Back up and restore\n")[2].partition("\n## ")[0]
    back_up, restore = re.findall(r"^```\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    old = next(clusters)
    for user in ("mlflow", "optuna"):
        old.query(user, "CREATE TABLE kept (number serial PRIMARY KEY, name text)")
        old.query(user, f"INSERT INTO kept (name) VALUES ('of {user}')")
    (tmp_path / "artifacts" / "model").write_text("weights")
    old.type(back_up)
    (tmp_path / "calls").unlink()

    new = next(clusters)
    new.type(restore)
    for user in ("mlflow", "optuna"):
        new.query(user, "INSERT INTO kept (name) VALUES ('new')")
        assert new.query(user, "SELECT name FROM kept ORDER BY number") == f"of {user}\nnew"
    with pytest.raises(AssertionError, match="permission denied for database"):
        new.postgres.query("mlflow", "optuna", new.here.secrets["postgres"]["optuna-password"], "SELECT 1")
    assert (tmp_path / "artifacts" / "model").read_text() == "weights"

    calls = (tmp_path / "calls").read_text().splitlines()
    restored = max(place for place, call in enumerate(calls) if "pg_restore" in call)
    before = " ".join(calls[: restored + 1])
    assert not [file.name for file in FOLDER.glob("[4-8]*.yaml") if file.name in before], "they would write there"
    assert all((FOLDER.parent / name).exists() for name in re.findall(r"k8s/\S+\.yaml", " ".join(calls)))
    assert calls[-1] == "apply -f k8s"

    with pytest.raises(AssertionError, match="already exists"):
        new.type(restore)
    assert new.query("mlflow", "SELECT name FROM kept ORDER BY number") == "of mlflow\nnew", "as it was"
