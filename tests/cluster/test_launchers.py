"""The files of `ray up`: Ray's own schema takes them, and versions and the token are those of the other ways."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.k8s.pods import image

FILES = sorted((Path(__file__).parents[2] / "cluster").glob("launcher-*.yaml"))


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return found


def test_there_is_one_for_a_cloud_and_one_for_own_machines() -> None:
    assert [read(file)["provider"]["type"] for file in FILES] == ["aws", "local"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_ray_up_takes_it(file: Path) -> None:
    validate_config(prepare_config(read(file)))


@pytest.mark.parametrize("change", [{"idle_timeout_minutes": "five"}, {"head_nodetype": "head"}, {"provider": {}}])
def test_ray_up_would_refuse(change: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, KeyError)):
        validate_config(prepare_config({**read(FILES[0]), **change}))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nodes_ask_for_the_token_and_all_have_it(file: Path) -> None:
    config = read(file)
    for group in ("head", "worker"):
        started = [command for command in config[f"{group}_start_ray_commands"] if "ray start" in command]
        assert len(started) == 1
        assert "RAY_AUTH_MODE=token" in started[0]
    assert "~/.ray/auth_token" in config["file_mounts"].values()


def test_versions_are_those_that_were_tested() -> None:
    cloud, own = (read(file) for file in FILES)
    assert cloud["docker"]["image"].endswith(f"/{image()}")
    assert any("--constraint ~/onethreshold/constraints.txt" in command for command in own["setup_commands"])
