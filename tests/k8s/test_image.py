"""The Dockerfile without Docker: a linter reads it, and its steps of Python run in a fresh virtual environment."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.here import reachable
from tests.k8s.manifests import ROOT, Manifests
from tests.k8s.pods import constraints, image, plain

TARGETS = ("cpu", "gpu")


@dataclass(frozen=True)
class Step:
    word: str
    rest: str


def stages() -> dict[str, list[Step]]:
    """The steps of each stage, those of the stages that it is made from first."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[Step]] = {}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            source, _, name = rest.split()
            found[name] = [*found.get(source, [Step(word, source)])]
        else:
            found[name].append(Step(word, rest.strip()))
    return found


def test_the_linter_finds_nothing() -> None:
    done = subprocess.run(["hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False, env=path())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("change", [("USER 1000:1000", "USER root"), (":3.11.14-slim-bookworm", ":latest")])
def test_the_linter_would_find(change: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text((ROOT / "Dockerfile").read_text().replace(*change))
    words = ["hadolint", "Dockerfile"]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True, check=False, env=path()).returncode == 1


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_is_what_the_manifests_take_it_for(target: str) -> None:
    steps = stages()[target]
    [user] = [step.rest for step in steps if step.word == "USER"]
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(step.rest for step in steps if step.word == "ENV")))
    for pod in Manifests.read().pods():
        if plain(pod.containers[0]) == image():
            security = pod.spec["securityContext"]
            assert f"{security['runAsUser']}:{security['runAsGroup']}" == user
            homes = [mount["mountPath"] for mount in pod.containers[0].get("volumeMounts", ())]
            assert environment["HOME"] in homes or pod.component == "bootstrap"
    # KubeRay's own probes, should a manifest not bring its own, are shell and wget.
    assert any("wget" in step.rest for step in steps if step.word == "RUN")
    assert [step.rest.split()[0] for step in steps if step.word == "COPY"] == [f"--from=build-{target}"]


def test_make_image_builds_what_the_manifests_name() -> None:
    # Under `make test` this is a make within a make, which would print the folder it works in.
    words = ["make", "--no-print-directory", "--dry-run", "image"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"docker build --target gpu --tag {image()} ."


def test_the_context_is_small_and_holds_what_is_copied(tmp_path: Path) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    size = sum(
        file.stat().st_size for name in kept for file in [ROOT / name, *(ROOT / name).rglob("*")] if file.is_file()
    )
    assert size < 5 * 2**20
    assert sorted(copied()) == sorted(kept)
    rules = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith(("#", "!"))
    ]
    assert rules == ["*", "**/__pycache__"], "all but that stays at home"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS)
def test_the_steps_of_python_in_a_fresh_environment(target: str, tmp_path: Path) -> None:
    """As the builder runs them, in a copy of what it copies.

    The gigabytes of the dependencies are resolved and not fetched; that each is the version of constraints.txt is
    checked. The project's own wheel is built and installed, and then runs beside the dependencies of these tests.
    """
    context, environment = tmp_path / "build", tmp_path / "environment"
    context.mkdir()
    for name in copied():
        copy: Any = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, context / name)
    report = tmp_path / "report.json"
    for step in stages()[f"build-{target}"]:
        if step.word != "RUN":
            continue
        words = [word.replace("/opt/onethreshold", str(environment)) for word in shlex.split(step.rest)]
        if "install" in words:
            if not reachable("download.pytorch.org"):
                words = without(words, "--extra-index-url")
            run([*words, "--dry-run", "--report", str(report)], context, environment)
            run([*words, "--no-deps"], context, environment)
        else:
            run([sys.executable, *words[1:]], context, environment)
    installed = {
        each["metadata"]["name"].lower(): each["metadata"]["version"]
        for each in json.loads(report.read_text())["install"]
    }
    installed.pop("onethreshold")
    pinned = {re.sub(r"[-_.]+", "-", name): version for name, version in constraints().items()}
    for name, version in installed.items():
        assert pinned.get(re.sub(r"[-_.]+", "-", name)) == version.partition("+")[0], name
    assert {"ray", "mlflow", "psycopg", "flask-wtf", f"faiss-{target}"} <= set(installed)
    assert not {"pytest", "ruff", "kubernetes-validate", f"faiss-{'gpu' if target == 'cpu' else 'cpu'}"} & set(
        installed
    )

    [packages] = environment.glob("lib/python3.*/site-packages")
    [here] = {path for path in sys.path if path.endswith("site-packages")}
    (packages / "dependencies.pth").write_text(here)
    code = "import tune.page, serve.app, cluster.doctor, dml; print(dml.__file__, *tune.page.__path__)"
    said = run(["python", "-c", code], tmp_path, environment)
    assert said.split() == [str(packages / "dml" / "__init__.py"), str(packages / "tune" / "page")], "it is baked in"
    assert {path.name for path in (packages / "tune" / "page").glob("page.*")} == {"page.html", "page.css", "page.js"}


def copied() -> list[str]:
    """What the Dockerfile copies from the context."""
    words = [step.rest.split() for step in stages()["build"] if step.word == "COPY"]
    return [name.rstrip("/") for each in words for name in each[:-1]]


def without(words: list[str], option: str) -> list[str]:
    return [word for index, word in enumerate(words) if option not in (word, words[index - 1])]


def run(words: list[str], folder: Path, environment: Path) -> str:
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own["PATH"] = f"{environment / 'bin'}{os.pathsep}{own['PATH']}"
    done = subprocess.run(words, cwd=folder, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def path() -> dict[str, str]:
    """With the environment's programs first."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
