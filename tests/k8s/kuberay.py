"""Rules of KubeRay's operator that no schema holds, and of what we want of a Ray cluster."""

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from tests.k8s.manifests import Manifests, named
from tests.k8s.pods import quantity

LONGEST = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
OF_THE_OPERATOR = {
    "RAY_REDIS_ADDRESS",
    "REDIS_PASSWORD",
    "REDIS_USERNAME",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_ADDRESS",
    "RAY_enable_autoscaler_v2",
}
"""Variables that the operator sets from fields of its own, and refuses, or would not set, beside them."""


def names(manifests: Manifests) -> Iterator[str]:
    for each in manifests.of(*LONGEST):
        name = each["metadata"]["name"]
        if len(name) > LONGEST[each["kind"]] or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield f"{named(each)}: a name has at most {LONGEST[each['kind']]} small letters, digits and '-'"


def clusters(manifests: Manifests) -> Iterator[str]:
    for name, cluster in manifests.clusters():
        head = cluster["headGroupSpec"]
        for is_so, fault in (
            (cluster.get("authOptions", {}).get("mode") != "token", "authOptions.mode is not token"),
            (cluster.get("enableInTreeAutoscaling") is not True, "no autoscaler"),
            (cluster.get("autoscalerOptions", {}).get("version") != "v2", "the autoscaler is not v2"),
            (head["rayStartParams"].get("num-cpus") != "0", 'num-cpus of the head is not "0": work would run there'),
            ("redis-password" in head["rayStartParams"], "redis-password belongs into gcsFaultToleranceOptions"),
            (head["template"]["spec"]["containers"][0]["name"] != "ray-head", "the first container must be Ray's"),
        ):
            if is_so:
                yield f"{name}: {fault}"
        fault_tolerant = "gcsFaultToleranceOptions" in cluster
        if fault_tolerant == name.startswith("RayJob"):
            yield f"{name}: a head that others rely on keeps its state in Redis; that of one job needs none"
        yield from _groups(name, cluster)


def jobs(manifests: Manifests) -> Iterator[str]:
    for each in manifests.of("RayJob"):
        spec = each["spec"]
        words = shlex.split(spec["entrypoint"])
        for is_so, fault in (
            (spec.get("backoffLimit", 0) < 1, "is not tried again (backoffLimit)"),
            (spec.get("activeDeadlineSeconds", 0) < 1, "has no deadline"),
            ("clusterSelector" in spec, "clusterSelector does not go with backoffLimit"),
            ("ttlSecondsAfterFinished" in spec and not spec.get("shutdownAfterJobFinishes"), "ttl without shutdown"),
            (not {"--name", "--go-on"} <= set(words), "tried again, it would not go on by its name"),
            (
                spec.get("submitterPodTemplate", {}).get("spec", {}).get("restartPolicy") != "Never",
                "submitter restarts",
            ),
        ):
            if is_so:
                yield f"{named(each)}: {fault}"
        storage = words[words.index("--storage") + 1] if "--storage" in words[:-1] else "none"
        for pod in [pod for pod in manifests.pods() if pod.is_ray and pod.name.startswith(named(each))]:
            mounts = [mount for mount in pod.containers[0].get("volumeMounts", ()) if mount["name"] == "shared"]
            if not any(storage.startswith(f"{mount['mountPath']}/") for mount in mounts):
                yield f"{pod.name}: --storage {storage} is not on the shared volume"


def environments(manifests: Manifests) -> Iterator[str]:
    """All nodes of a cluster have one environment, and what the operator sets is left to it."""
    for name, cluster in manifests.clusters():
        head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", [])
        taken = OF_THE_OPERATOR & {variable["name"] for variable in head}
        if taken:
            yield f"{name}: {', '.join(sorted(taken))} is for the operator to set"
        for group in cluster["workerGroupSpecs"]:
            if group["template"]["spec"]["containers"][0].get("env", []) != head:
                yield f"{name}: the environment of {group['groupName']} is not that of the head"


def _groups(name: str, cluster: Mapping[str, Any]) -> Iterator[str]:
    for group in cluster["workerGroupSpecs"]:
        where = f"{name} {group['groupName']}"
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if not (
            isinstance(least, int) and isinstance(most, int) and 0 <= least <= group.get("replicas", least) <= most
        ):
            yield f"{where}: not minReplicas <= replicas <= maxReplicas"
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        if group["groupName"] == "gpu" and quantity(limits.get("nvidia.com/gpu", 0)) < 1:
            yield f"{where}: no GPU"
    for each in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        if each["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: autoscaler v2 wants restartPolicy Never"
