"""Rules of every pod: rights, resources, probes, images; and that versions agree with constraints.txt everywhere."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from tests.k8s.manifests import ROOT, Manifests, ports_of, text_of

UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1.0}
ONCE = ("bootstrap", "submitter")
"""Components that run to an end: they need no probes."""


def constraints() -> dict[str, str]:
    """The exact versions by package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line)


def image() -> str:
    """The image that `make image` builds: the project's version and Ray's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return f"onethreshold:{project['version']}-ray{constraints()['ray']}"


def plain(container: Mapping[str, Any]) -> str:
    """A container's image without the registry, which is each team's own."""
    return str(container.get("image")).rpartition("/")[2]


def restricted(manifests: Manifests) -> Iterator[str]:
    """Kubernetes' restricted profile, and a root file system that cannot be written."""
    for pod in manifests.pods():
        security = pod.spec.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
            yield f"{pod.name}: runs as root"
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.name}: seccompProfile is not RuntimeDefault"
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.name}: Services put variables such as MLFLOW_PORT into it; enableServiceLinks: false"
        if any(pod.spec.get(each) for each in ("hostNetwork", "hostPID", "hostIPC")) or "hostPath" in str(pod.spec):
            yield f"{pod.name}: shares what is the node's"
        for container in pod.containers:
            own = container.get("securityContext", {})
            for fault, is_so in (
                ("may gain privileges", own.get("allowPrivilegeEscalation") is not False),
                ("keeps capabilities", own.get("capabilities", {}) != {"drop": ["ALL"]}),
                ("can write its root file system", own.get("readOnlyRootFilesystem") is not True),
                ("is privileged", bool(own.get("privileged"))),
            ):
                if is_so:
                    yield f"{pod.name} {container['name']}: {fault}"


def resources(manifests: Manifests) -> Iterator[str]:
    """Requests and limits of CPU and memory everywhere, no limit below its request, memory equal."""
    for pod in manifests.pods():
        for container in pod.containers:
            name = f"{pod.name} {container['name']}"
            requests = container.get("resources", {}).get("requests", {})
            limits = container.get("resources", {}).get("limits", {})
            for kind in ("cpu", "memory"):
                if kind not in requests or kind not in limits:
                    yield f"{name}: no request or no limit of {kind}"
            for kind in sorted(set(requests) & set(limits)):
                if quantity(limits[kind]) < quantity(requests[kind]):
                    yield f"{name}: limit of {kind} {limits[kind]} is below its request {requests[kind]}"
            # Ray's object store, and the kernel's choice of a victim, go by the request.
            if requests.get("memory") != limits.get("memory"):
                yield f"{name}: request and limit of memory differ"
            if limits.get("nvidia.com/gpu") != requests.get("nvidia.com/gpu"):
                yield f"{name}: request and limit of GPUs differ"
        tolerates = any(each.get("key") == "nvidia.com/gpu" for each in pod.spec.get("tolerations", ()))
        if any("nvidia.com/gpu" in str(container.get("resources")) for container in pod.containers) != tolerates:
            yield f"{pod.name}: GPUs and the toleration of their nodes' taint go together"


def probes(manifests: Manifests) -> Iterator[str]:
    """Readiness and liveness of whatever stays, at ports that it has."""
    for pod in manifests.pods():
        if pod.component in ONCE:
            continue
        main = pod.containers[0]
        for kind in ("readinessProbe", "livenessProbe"):
            if kind not in main:
                yield f"{pod.name} {main['name']}: no {kind}"
        for kind in ("readinessProbe", "livenessProbe", "startupProbe"):
            port = main.get(kind, {}).get("httpGet", {}).get("port")
            if port is not None and port != AGENT and port not in ports_of(pod):
                yield f"{pod.name} {main['name']}: {kind} asks port {port}, which it has not"


AGENT = 52365
"""Where Ray's agent of a node says how the node is."""


def images(manifests: Manifests) -> Iterator[str]:
    """Our image is the one that `make image` builds; others have an exact version."""
    for pod in manifests.pods():
        for container in pod.containers:
            found = plain(container)
            if found.startswith("onethreshold") and found != image():
                yield f"{pod.name} {container['name']}: image {found} is not {image()}"
            if not re.fullmatch(r"onethreshold:.+|[a-z]+:\d+\.\d+(\.\d+)?-[a-z]+", found):
                yield f"{pod.name} {container['name']}: image {found} has no exact version"


def ray_versions(manifests: Manifests) -> Iterator[str]:
    """rayVersion is that of constraints.txt."""
    for name, cluster in manifests.clusters():
        if cluster.get("rayVersion") != constraints()["ray"]:
            yield f"{name}: rayVersion is {cluster.get('rayVersion')!r}, constraints.txt has {constraints()['ray']}"


def writable(manifests: Manifests) -> Iterator[str]:
    """Where programs write: /tmp everywhere, and the home of our image."""
    for pod in manifests.pods():
        for container in pod.containers:
            mounted = {mount["mountPath"] for mount in container.get("volumeMounts", ())}
            ours = plain(container).startswith("onethreshold:") and pod.component != "bootstrap"
            if ours and not {"/tmp", "/home/ray"} <= mounted:
                yield f"{pod.name} {container['name']}: /tmp and /home/ray cannot be written"
            for path in _paths(container):
                if not any(path == each or path.startswith(f"{each}/") for each in mounted):
                    yield f"{pod.name} {container['name']}: {path} is on no volume"


def _paths(container: Mapping[str, Any]) -> Iterator[str]:
    """The absolute paths that its environment and words name."""
    for value in text_of([container.get("env"), container.get("args")]):
        if re.fullmatch(r"/[a-z][\w./-]*", value):
            yield value


def quantity(text: object) -> float:
    """Kubernetes' 500m, 2Gi as a number."""
    found = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", str(text))
    assert found, text
    return float(found[1]) * UNITS[found[2]]
