"""`kubectl apply -f k8s`: the manifests break no rule. That each rule can see a fault is in test_seeded_faults.py."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.k8s import rules, schemas
from tests.k8s.manifests import FOLDER, Manifests, Pod, named
from tests.k8s.network import CLIENT, OPERATOR, arrows
from tests.k8s.pods import constraints, image, plain
from tests.k8s.programs import python_fault

CRDS = os.environ.get("ONETHRESHOLD_KUBERAY_CRDS")
"""Folder of KubeRay's CRDs (helm-chart/kuberay-operator/crds of its repository), where there is a copy."""


@pytest.fixture(scope="module")
def manifests() -> Manifests:
    return Manifests.read()


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: f"{rule.__module__.rpartition('.')[2]}-{rule.__name__}")
def test_no_rule_is_broken(rule: rules.Rule, manifests: Manifests) -> None:
    assert list(rule(manifests)) == []


@pytest.mark.parametrize("version", schemas.VERSIONS)
def test_kubernetes_takes_them(version: str, manifests: Manifests) -> None:
    found = [*schemas.kubernetes(manifests, version), *schemas.kuberay(manifests, version)]
    assert found == []


def test_monitoring_is_apart_and_asks_ports_that_pods_have(manifests: Manifests) -> None:
    monitor, policy = Manifests.read(FOLDER / "monitoring").objects
    assert list(schemas.kubernetes(Manifests([policy]))) == []
    assert monitor["kind"] == "PodMonitor"
    of_ray = [pod for pod in manifests.pods() if pod.is_ray]
    ports = {port["name"]: port["containerPort"] for pod in of_ray for port in pod.containers[0]["ports"]}
    assert [ports[each["port"]] for each in monitor["spec"]["podMetricsEndpoints"]] == [
        each["port"] for rule in policy["spec"]["ingress"] for each in rule["ports"]
    ]
    assert monitor["spec"]["selector"] == policy["spec"]["podSelector"]


def test_the_folder_holds_what_kubectl_applies_in_order() -> None:
    files = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".yaml", ".yml", ".json"))
    assert files[0] == "00-namespace.yaml"
    assert "kustomization.yaml" not in files
    order = [named(each) for each in Manifests.read().objects]
    assert order.index("NetworkPolicy/default-deny") < order.index("Job/bootstrap") < order.index("RayCluster/training")


def test_every_pod_of_ray_runs_one_image_of_the_versions_that_were_tested(manifests: Manifests) -> None:
    assert {plain(container) for pod in ray_pods(manifests) for container in pod.containers} == {image()}
    assert image() == f"onethreshold:0.1.0-ray{constraints()['ray']}"


def test_the_table_in_the_readme_shows_every_arrow_and_no_other(manifests: Manifests) -> None:
    rows = (FOLDER / "README.md").read_text().partition("| from | to | port |\n|---|---|---|\n")[2]
    shown = set()
    for row in rows.partition("\n\n")[0].splitlines():
        cells = [re.sub(r" \(.*?\)", "", cell).strip().split(", ") for cell in row.strip("|").split("|")]
        shown |= {(source, target, int(port)) for source in cells[0] for target in cells[1] for port in cells[2]}
    drawn = set()
    for source, target, port, _ in arrows(manifests):
        ends = [each.component if isinstance(each, Pod) else each.name for each in (source, target)]
        if ends[0] != ends[1]:
            drawn.add((*ends, port))
    assert shown == drawn


def test_the_readme_names_the_versions_that_are_taken() -> None:
    text = (FOLDER / "README.md").read_text()
    for version in (
        f"Ray {constraints()['ray']}",
        f"MLflow {constraints()['mlflow']}",
        "KubeRay 1.7",
        *schemas.VERSIONS,
    ):
        assert version in text


def test_the_commands_in_the_readme_are_read_by_their_programs(tmp_path: Path) -> None:
    weights = tmp_path / "resnet50.safetensors"  # which programs look for before they start
    weights.touch()
    blocks = re.findall(r"^```\w*\n(.*?)^```$", (FOLDER / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.partition("python -m ")[2], comments=True) for line in lines if "python -m " in line]
    assert {words[0] for words in found} == {"cluster.doctor", "tune.search", "tune.promote"}
    for words in found:
        there = [str(weights) if word.endswith(weights.name) else word for word in words]
        assert python_fault(there[0], there[1:]) == ""


def test_arrows_are_read_out_of_addresses(manifests: Manifests) -> None:
    """The list is not empty by accident: some arrows that must be in it."""
    found = {(source.name, target.name, port) for source, target, port, _ in arrows(manifests)}
    assert {
        ("Deployment/mlflow", "StatefulSet/postgres", 5432),
        ("Job/bootstrap", "Deployment/mlflow", 5000),
        ("RayJob/search gpu workers", "StatefulSet/postgres", 5432),
        ("RayService/endpoint gpu workers", "Deployment/mlflow", 5000),
        ("RayCluster/training redis-cleanup", "StatefulSet/redis", 6379),
        ("RayJob/search submitter", "RayJob/search head", 8265),
        (OPERATOR.name, "RayService/endpoint head", 8265),
        (CLIENT.name, "RayService/endpoint gpu workers", 8000),
    } <= found
    assert not [each for each in found if each[0].startswith("RayService") and "postgres" in each[1]]


if CRDS:

    @pytest.fixture(scope="module")
    def crds() -> dict[str, jsonschema.Draft202012Validator]:
        """The validators by kind."""
        found = {}
        for file in Path(CRDS).glob("*.yaml"):
            crd = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            version = next(each for each in crd["spec"]["versions"] if each["name"] == "v1" or each["storage"])
            schema = as_json_schema(version["schema"]["openAPIV3Schema"])
            found[crd["spec"]["names"]["kind"]] = jsonschema.Draft202012Validator(schema)
        return found

    def test_kuberay_takes_them(manifests: Manifests, crds: dict[str, jsonschema.Draft202012Validator]) -> None:
        for each in manifests.of("RayCluster", "RayJob", "RayService"):
            assert [error.message for error in crds[each["kind"]].iter_errors(each)] == []

    @pytest.mark.parametrize(
        ("kind", "change"),
        [
            ("RayCluster", {"rayVersion": 2.60}),
            ("RayCluster", {"enableInTreeAutoscalling": True}),
            ("RayJob", {"backoffLimit": "3"}),
            ("RayService", {"upgradeStrategy": {"kind": "NewCluster"}}),
        ],
    )
    def test_kuberay_would_refuse(
        kind: str, change: dict[str, Any], manifests: Manifests, crds: dict[str, jsonschema.Draft202012Validator]
    ) -> None:
        changed = manifests.copied().of(kind)[0]
        changed["spec"].update(change)
        assert not crds[kind].is_valid(changed)


def ray_pods(manifests: Manifests) -> list[Pod]:
    return [pod for pod in manifests.pods() if pod.is_ray or pod.component == "submitter"]


def as_json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Kubernetes' dialect of OpenAPI in JSON Schema's words, and strict: no field that there is not."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    made = {key: schema[key] for key in ("type", "enum", "minimum", "maximum", "pattern", "required") if key in schema}
    if "items" in schema:
        made["items"] = as_json_schema(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = as_json_schema(schema["additionalProperties"])
    if "properties" in schema:
        made["properties"] = {key: as_json_schema(each) for key, each in schema["properties"].items()}
        made["additionalProperties"] = False
        made["required"] = [key for key in schema.get("required", ()) if "default" not in schema["properties"][key]]
    return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") else made
