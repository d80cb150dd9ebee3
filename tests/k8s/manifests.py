"""The manifests as the rules read them: objects, and all pods that come of them."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s"
NAMESPACE = "onethreshold"
CLUSTERS = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
"""Where in its spec each kind of KubeRay has its Ray cluster."""


@dataclass(frozen=True)
class Pod:
    """One kind of pod: that of a workload, or of a group of a Ray cluster.

    Attributes:
        name: for messages.
        template: of the manifest: metadata and spec.
        labels: with those that the operator adds.
        containers: all, the autoscaler's that the operator adds among them, as the manifest says it.
    """

    name: str
    template: Mapping[str, Any]
    labels: Mapping[str, str]
    containers: tuple[Mapping[str, Any], ...]

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.template["spec"]

    @property
    def component(self) -> str:
        return self.labels.get("app.kubernetes.io/component", "")

    @property
    def is_ray(self) -> bool:
        return self.labels.get("ray.io/node-type") in ("head", "worker")


@dataclass(frozen=True)
class Manifests:
    """All objects of a folder, in the order in which kubectl applies them."""

    objects: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path = FOLDER) -> "Manifests":
        files = sorted(folder.glob("*.yaml"))
        return cls([each for file in files for each in yaml.load_all(file.read_text(), _Strict)])

    def copied(self) -> "Manifests":
        """One that may be changed: also what YAML's anchors shared is apart."""
        return Manifests([copy.deepcopy(_apart(each)) for each in self.objects])

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [each for each in self.objects if each.get("kind") in kinds]

    def get(self, kind: str, name: str) -> dict[str, Any]:
        return next(each for each in self.of(kind) if each["metadata"]["name"] == name)

    def names(self, kind: str) -> set[str]:
        return {each["metadata"]["name"] for each in self.of(kind)}

    def clusters(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The Ray clusters by the names of their objects."""
        for each in self.of(*CLUSTERS):
            spec = each["spec"]
            for step in CLUSTERS[each["kind"]]:
                spec = spec[step]
            yield named(each), spec

    def pods(self) -> list[Pod]:
        workloads = self.of("Job", "Deployment", "StatefulSet")
        found = [_pod(named(each), each["spec"]["template"]) for each in workloads]
        for name, cluster in self.clusters():
            found += _ray_pods(name, cluster)
        for each in self.of("RayJob"):
            if "submitterPodTemplate" in each["spec"]:
                found.append(_pod(f"{named(each)} submitter", each["spec"]["submitterPodTemplate"]))
        return found


def named(each: Mapping[str, Any]) -> str:
    return f"{each.get('kind')}/{each.get('metadata', {}).get('name')}"


def text_of(value: Any) -> Iterator[str]:
    """All strings in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from text_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from text_of(each)


def ports_of(pod: Pod) -> dict[Any, int]:
    """Its ports by their names and by their numbers."""
    ports = [port for container in pod.containers for port in container.get("ports", ())]
    found: dict[Any, int] = {port["containerPort"]: port["containerPort"] for port in ports}
    return found | {port["name"]: port["containerPort"] for port in ports if "name" in port}


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects these labels."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for each in selector.get("matchExpressions", ()):
        value, values = labels.get(each["key"]), each.get("values", ())
        fits = {"In": value in values, "NotIn": value not in values, "Exists": value is not None}
        if not fits.get(each["operator"], value is None):
            return False
    return True


def _pod(name: str, template: Mapping[str, Any]) -> Pod:
    spec = template["spec"]
    containers = (*spec.get("initContainers", ()), *spec["containers"])
    return Pod(name, template, template.get("metadata", {}).get("labels", {}), containers)


def _ray_pods(name: str, cluster: Mapping[str, Any]) -> Iterator[Pod]:
    head = _pod(f"{name} head", cluster["headGroupSpec"]["template"])
    options = cluster.get("autoscalerOptions", {})
    kept = ("env", "resources", "securityContext", "volumeMounts")
    autoscaler = {
        "name": "autoscaler",
        "image": head.containers[0].get("image"),
        **{key: options[key] for key in kept if key in options},
    }
    containers = (*head.containers, *((autoscaler,) if cluster.get("enableInTreeAutoscaling") else ()))
    yield Pod(head.name, head.template, {**head.labels, "ray.io/node-type": "head"}, containers)
    for group in cluster.get("workerGroupSpecs", ()):
        worker = _pod(f"{name} {group['groupName']} workers", group["template"])
        yield Pod(worker.name, worker.template, {**worker.labels, "ray.io/node-type": "worker"}, worker.containers)


def _apart(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _apart(each) for key, each in value.items()}
    return [_apart(each) for each in value] if isinstance(value, list) else value


class _Strict(yaml.SafeLoader):
    """YAML as kubectl takes it: a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {', '.join(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)
