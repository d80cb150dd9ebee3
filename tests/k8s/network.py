"""Rules of the network: what NetworkPolicies let through, against what the manifests say talks to what.

Every arrow must be open at both ends, and nothing else may be.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.k8s.manifests import NAMESPACE, Manifests, Pod, ports_of, selects, text_of

ANY_PORT = 23456
"""One of the ports that Ray chooses by itself."""
LISTENING = (5000, 5432, 6379, 8000, 8080, 8265, 10001, ANY_PORT)


@dataclass(frozen=True)
class Outside:
    """Pods of another namespace, or with labels None an address that is no pod."""

    name: str
    namespace: Mapping[str, str]
    labels: Mapping[str, str] | None


DNS = Outside("DNS", {"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"})
API_SERVER = Outside("the API server", {}, None)
OPERATOR = Outside(
    "the operator", {"kubernetes.io/metadata.name": "kuberay"}, {"app.kubernetes.io/name": "kuberay-operator"}
)
CLIENT = Outside("a client", {"onethreshold/client": "true"}, {})
STRANGER = Outside("a stranger", {"kubernetes.io/metadata.name": "else"}, {"app.kubernetes.io/name": "kuberay"})
HERE = {"kubernetes.io/metadata.name": NAMESPACE, "app.kubernetes.io/part-of": "onethreshold"}
Arrow = tuple["Pod | Outside", "Pod | Outside", int, str]


def arrows(manifests: Manifests) -> list[Arrow]:
    """What talks to what: read out of addresses in the manifests, and what Ray, Kubernetes and the operator need."""
    pods, found = manifests.pods(), []
    for pod in pods:
        found += [(pod, DNS, 53, "UDP"), (pod, DNS, 53, "TCP")]
        found += [(pod, other, port, "TCP") for other, port in _addressed(manifests, pod)]
        if pod.labels.get("ray.io/node-type") == "head" or pod.component == "bootstrap":
            found += [(pod, API_SERVER, 443, "TCP"), (pod, API_SERVER, 6443, "TCP")]
        if pod.is_ray:
            found += [(pod, other, port, "TCP") for other in _same_cluster(pods, pod) for port in LISTENING]
    for head in [pod for pod in pods if pod.labels.get("ray.io/node-type") == "head"]:
        found += [(OPERATOR, head, 8265, "TCP"), (OPERATOR, head, 8000, "TCP")]
        owner = head.name.removesuffix(" head")
        found += [(pod, head, 8265, "TCP") for pod in pods if pod.name == f"{owner} submitter"]
        for redis in [pod for pod in pods if pod.component == "redis" and _uses_redis(manifests, owner)]:
            labels = {**head.labels, "ray.io/node-type": "redis-cleanup"}
            cleaner = Pod(f"{owner} redis-cleanup", head.template, labels, head.containers)
            found += [(head, redis, 6379, "TCP"), (cleaner, redis, 6379, "TCP"), (cleaner, DNS, 53, "UDP")]
    for pod in pods:
        if pod.name.startswith("RayService") and pod.is_ray:
            found.append((CLIENT, pod, 8000, "TCP"))
    return found


def open_at_both_ends(manifests: Manifests) -> Iterator[str]:
    """Every arrow is let out where it begins and let in where it ends."""
    for source, target, port, protocol in arrows(manifests):
        what = f"{source.name} -> {target.name}:{port} {protocol}"
        if isinstance(source, Pod) and not _passes(manifests, "Egress", source, target, port, protocol):
            yield f"{what}: no policy lets it out"
        if isinstance(target, Pod) and not _passes(manifests, "Ingress", target, source, port, protocol):
            yield f"{what}: no policy lets it in"


def nothing_else(manifests: Manifests) -> Iterator[str]:
    """No pod lets in, or lets out to another pod, what is no arrow."""
    pods = manifests.pods()
    wanted = {(source.name, target.name, port) for source, target, port, _ in arrows(manifests)}
    for target in pods:
        for source in (*pods, CLIENT, STRANGER, OPERATOR):
            for port in LISTENING:
                if (source.name, target.name, port) in wanted:
                    continue
                if _passes(manifests, "Ingress", target, source, port, "TCP"):
                    yield f"{source.name} -> {target.name}:{port}: let in, and nothing needs it"
                if isinstance(source, Pod) and _passes(manifests, "Egress", source, target, port, "TCP"):
                    yield f"{source.name} -> {target.name}:{port}: let out, and nothing needs it"
    for pod in pods:
        if (pod.name, API_SERVER.name, 443) not in wanted and _passes(manifests, "Egress", pod, API_SERVER, 443, "TCP"):
            yield f"{pod.name} -> {API_SERVER.name}: let out, and nothing needs it"


def _addressed(manifests: Manifests, pod: Pod) -> Iterator[tuple[Pod, int]]:
    """The pods behind every SERVICE:PORT that the pod's environment, words or ConfigMaps name."""
    maps = [each["configMap"]["name"] for each in pod.spec.get("volumes", ()) if "configMap" in each]
    words = [container.get(part) for container in pod.containers for part in ("env", "command", "args")]
    words += [manifests.get("ConfigMap", name)["data"] for name in maps if name in manifests.names("ConfigMap")]
    for text in text_of(words):
        for service in manifests.of("Service"):
            name = re.escape(service["metadata"]["name"])
            for port in re.findall(rf"(?://|@|^){name}(?:\.[a-z.]+)?:(\d+)", text):
                yield from _behind(manifests, service, int(port), pod)


def _behind(manifests: Manifests, service: Mapping[str, Any], port: int, asking: Pod) -> Iterator[tuple[Pod, int]]:
    for pod in manifests.pods():
        if pod.name == asking.name or not selects({"matchLabels": service["spec"]["selector"]}, pod.labels):
            continue
        found = [each.get("targetPort", port) for each in service["spec"]["ports"] if each["port"] == port]
        # A port that the Service has not: nothing listens, and no policy can open it.
        yield pod, ports_of(pod).get(found[0], 0) if found else 0


def _same_cluster(pods: list[Pod], pod: Pod) -> list[Pod]:
    owner = pod.name.split()[0]
    return [other for other in pods if other.is_ray and other.name.split()[0] == owner]


def _uses_redis(manifests: Manifests, owner: str) -> bool:
    return any("gcsFaultToleranceOptions" in cluster for name, cluster in manifests.clusters() if name == owner)


def _passes(manifests: Manifests, direction: str, pod: Pod, other: Pod | Outside, port: int, protocol: str) -> bool:
    """Whether the policies of a pod let a connection pass; what no policy selects is open."""
    policies = [each["spec"] for each in manifests.of("NetworkPolicy")]
    chosen = [
        each for each in policies if selects(each["podSelector"], pod.labels) and direction in each["policyTypes"]
    ]
    side, ports_side = ("from", pod) if direction == "Ingress" else ("to", other)
    rules = [rule for each in chosen for rule in each.get(direction.lower(), ())]
    return not chosen or any(
        _peers(rule.get(side), other) and _ports(rule, ports_side, port, protocol) for rule in rules
    )


def _peers(peers: list[dict[str, Any]] | None, other: Pod | Outside) -> bool:
    if peers is None:
        return True
    for peer in peers:
        if "ipBlock" in peer:
            continue  # of addresses outside; pods' own are not known
        if isinstance(other, Pod):
            namespace, labels = HERE, other.labels
        elif other.labels is None:
            continue
        else:
            namespace, labels = dict(other.namespace), other.labels
        same = (
            isinstance(other, Pod) if "namespaceSelector" not in peer else selects(peer["namespaceSelector"], namespace)
        )
        if same and selects(peer.get("podSelector", {}), labels):
            return True
    return False


def _ports(rule: Mapping[str, Any], of: Pod | Outside, port: int, protocol: str) -> bool:
    if "ports" not in rule:
        return True
    known = ports_of(of) if isinstance(of, Pod) else {}
    return any(
        each.get("protocol", "TCP") == protocol and known.get(each["port"], each["port"]) == port
        for each in rule["ports"]
    )
