"""Rules of form: Kubernetes' own schemas, and the fields of KubeRay's kinds that the manifests use."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import referencing
from kubernetes_validate import utils

from tests.k8s.manifests import Manifests, named

VERSIONS = ("1.33", "1.35", "1.37")
"""Releases of Kubernetes that the manifests are for."""

KEY = {"valueFrom": {"secretKeyRef": {"name": str, "key": str}}}
TEMPLATE = "pod template"
"""Stands for what Kubernetes' own schema says of pods."""
CONTAINER = "part of a container"
GROUP = {"rayStartParams": {str: str}, "template": TEMPLATE}
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str, "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": str,
        "idleTimeoutSeconds": int,
        "env": CONTAINER,
        "resources": CONTAINER,
        "securityContext": CONTAINER,
        "volumeMounts": CONTAINER,
    },
    "gcsFaultToleranceOptions": {"redisAddress": str, "redisPassword": KEY},
    "headGroupSpec": GROUP,
    "workerGroupSpecs": [
        {**GROUP, "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "idleTimeoutSeconds": int}
    ],
}
FIELDS: dict[str, dict[Any, Any]] = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "entrypoint": str,
        "submissionMode": str,
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "submitterConfig": {"backoffLimit": int},
        "submitterPodTemplate": TEMPLATE,
        "suspend": bool,
        "rayClusterSpec": CLUSTER,
    },
    "RayService": {
        "excludeHeadPodFromServeSvc": bool,
        "rayClusterDeletionDelaySeconds": int,
        "upgradeStrategy": {"type": str},
        "serveConfigV2": str,
        "rayClusterConfig": CLUSTER,
    },
}
"""The fields of KubeRay 1.7 that the manifests use, with their types: another is a typing error, or belongs here."""
API = {"RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "RayService": "ray.io/v1"}
REQUIRED = {"RayCluster": ("headGroupSpec",), "RayJob": ("entrypoint",), "RayService": ("rayClusterConfig",)}


def kubernetes(manifests: Manifests, version: str = VERSIONS[-1]) -> Iterator[str]:
    """Every object that is Kubernetes' own, strictly: no field that there is not."""
    for each in manifests.objects:
        if each.get("kind") not in FIELDS:
            yield from _faults(each, version, named(each))


def kuberay(manifests: Manifests, version: str = VERSIONS[-1]) -> Iterator[str]:
    """Every object of KubeRay: its fields and their types, its pods by Kubernetes' schema."""
    for each in manifests.of(*FIELDS):
        kind, name = each["kind"], named(each)
        if each.get("apiVersion") != API[kind]:
            yield f"{name}: apiVersion is {each.get('apiVersion')}, not {API[kind]}"
        yield from (f"{name}: {field} is missing" for field in REQUIRED[kind] if field not in each.get("spec", {}))
        yield from (f"{name}: there is no field {field}" for field in each if field not in _OBJECT)
        yield from _fields(each.get("spec"), FIELDS[kind], f"{name} spec", version)


_OBJECT = ("apiVersion", "kind", "metadata", "spec")


def _fields(value: Any, wanted: Any, path: str, version: str) -> Iterator[str]:
    if wanted == TEMPLATE:
        body = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": value}
        yield from _faults(body, version, path)
    elif wanted == CONTAINER:
        part = {path.rpartition(".")[2]: value}
        spec = {"containers": [{"name": "x", "image": "x", **part}]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        yield from _faults(body, version, path)
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            yield f"{path}: {value!r} is no list"
            return
        for index, each in enumerate(value):
            yield from _fields(each, wanted[0], f"{path}[{index}]", version)
    elif isinstance(wanted, dict):
        if not isinstance(value, Mapping):
            yield f"{path}: {value!r} is no mapping"
            return
        for key, each in value.items():
            if str not in wanted and key not in wanted:
                yield f"{path}: there is no field {key}"
            else:
                yield from _fields(each, wanted.get(key, wanted.get(str)), f"{path}.{key}", version)
    elif type(value) is not wanted:
        yield f"{path}: {value!r} is no {wanted.__name__}"


def _faults(body: Mapping[str, Any], version: str, name: str) -> Iterator[str]:
    try:
        validator = _validator(version, body.get("kind", ""), body.get("apiVersion", ""))
    except FileNotFoundError:
        yield f"{name}: Kubernetes {version} has no {body.get('kind')} of {body.get('apiVersion')}"
        return
    for error in validator.iter_errors(body):
        yield f"{name} {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"


@functools.cache
def _validator(version: str, kind: str, api: str) -> jsonschema.Draft202012Validator:
    """The schema that kubernetes-validate --strict takes."""
    group, _, rest = api.rpartition("/")
    file = f"{kind.lower()}-{group.partition('.')[0]}-{rest}" if group else f"{kind.lower()}-{rest}"
    return jsonschema.Draft202012Validator(_read(version, file), registry=_definitions(version))


@functools.cache
def _definitions(version: str) -> "referencing.Registry[Any]":
    definitions = referencing.Resource.from_contents(_read(version, "_definitions"))
    return definitions @ referencing.Registry()


def _read(version: str, name: str) -> Any:
    patch = next(each for each in reversed(utils.all_versions()) if utils.major_minor(each) == version)
    return utils.schema_contents(f"kubernetes-json-schema/v{patch}-local-strict/{name}.json", version)
