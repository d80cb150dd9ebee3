"""Rules of names: whatever a manifest names is there, and labels meet the selectors that look for them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tests.k8s.manifests import NAMESPACE, Manifests, Pod, named, ports_of, selects

FROM_KUBERNETES = {("ConfigMap", "kube-root-ca.crt")}
"""What Kubernetes itself puts into every namespace."""


def namespaces(manifests: Manifests) -> Iterator[str]:
    """Every object lies in the one namespace, which comes first, and no two share a name."""
    objects = manifests.objects
    if not objects or named(objects[0]) != f"Namespace/{NAMESPACE}":
        yield f"the first object is not Namespace/{NAMESPACE}"
    seen = set()
    for each in objects:
        if each["kind"] != "Namespace" and each["metadata"].get("namespace") != NAMESPACE:
            yield f"{named(each)} lies in {each['metadata'].get('namespace')}, not in {NAMESPACE}"
        if named(each) in seen:
            yield f"{named(each)} is there twice"
        seen.add(named(each))


def no_credential(manifests: Manifests) -> Iterator[str]:
    """No Secret, and no password as a value: applying the folder again would overwrite the real ones."""
    yield from (f"{named(each)}: Secrets do not belong here" for each in manifests.of("Secret"))
    for pod, container, variable in _variables(manifests):
        if re.search("PASSWORD|SECRET|TOKEN|KEYS?$", variable["name"]) and "value" in variable:
            yield f"{pod.name} {container['name']}: {variable['name']} is a value, not of a Secret"
    for each in manifests.objects:
        if re.search(r"://[^/\s:@]+:[^@\s]+@", str(each)):
            yield f"{named(each)}: a URL with a password"


def secrets(manifests: Manifests, made: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Every Secret and key that is named is one that the bootstrap Job makes, and it may read what it makes."""
    for where, reference in _references(manifests, "secretKeyRef", "name"):
        if reference.get("key") not in made.get(reference.get("name", ""), ()):
            yield f"{where}: no Secret {reference.get('name')} with {reference.get('key')} is made by cluster.bootstrap"
    for name, cluster in manifests.clusters():
        named_there = cluster.get("authOptions", {}).get("secretName")
        if "auth_token" not in made.get(named_there, ()):
            yield f"{name}: authOptions.secretName is {named_there}, which has no auth_token"
    role = manifests.get("Role", "bootstrap")
    readable = {name for rule in role["rules"] if "get" in rule["verbs"] for name in rule.get("resourceNames", ())}
    if readable != set(made):
        yield f"Role/bootstrap: may read {sorted(readable)}, makes {sorted(made)}"
    for rule in role["rules"]:
        allowed = ["create"] if not rule.get("resourceNames") else ["get"]
        if rule["resources"] != ["secrets"] or rule["verbs"] != allowed:
            yield f"Role/bootstrap: {rule['verbs']} on {rule['resources']} is more than it needs"


def role_bindings(manifests: Manifests) -> Iterator[str]:
    """Roles and accounts that are bound, and accounts that pods take, are there; no role is for the whole cluster."""
    yield from (f"{named(each)}: rights over the whole cluster" for each in manifests.of("ClusterRoleBinding"))
    for each in manifests.of("RoleBinding"):
        if each["roleRef"]["name"] not in manifests.names("Role") or each["roleRef"]["kind"] != "Role":
            yield f"{named(each)}: there is no Role/{each['roleRef']['name']}"
        for subject in each["subjects"]:
            if subject["name"] not in manifests.names("ServiceAccount"):
                yield f"{named(each)}: there is no ServiceAccount/{subject['name']}"
    for pod in manifests.pods():
        account = pod.spec.get("serviceAccountName")
        is_head = pod.labels.get("ray.io/node-type") == "head"
        if is_head and account:
            yield f"{pod.name}: the operator makes the account of a head, with what its autoscaler may do"
        if not is_head and account not in manifests.names("ServiceAccount"):
            yield f"{pod.name}: there is no ServiceAccount/{account}"
        if not is_head and pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: gets a token of the API server, which it does not need"


def volumes(manifests: Manifests) -> Iterator[str]:
    """Volumes that are mounted are there, claims and ConfigMaps exist, several pods share only what can be shared."""
    claimed: dict[str, set[str]] = {}
    for pod in manifests.pods():
        there = {each["name"] for each in pod.spec.get("volumes", ())} | _templates(manifests, pod)
        mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", ())}
        yield from (f"{pod.name}: mounts {name}, which is no volume" for name in sorted(mounted - there))
        yield from (f"{pod.name}: volume {name} is mounted nowhere" for name in sorted(there - mounted))
        for container in pod.containers:
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
            if len(set(paths)) < len(paths):
                yield f"{pod.name} {container['name']}: two volumes at one path"
        for each in pod.spec.get("volumes", ()):
            claim = each.get("persistentVolumeClaim", {}).get("claimName")
            if claim:
                claimed.setdefault(claim, set()).add(pod.name)
            for name in _config_maps(each):
                if name not in manifests.names("ConfigMap") and ("ConfigMap", name) not in FROM_KUBERNETES:
                    yield f"{pod.name}: there is no ConfigMap/{name}"
    for claim, pods in claimed.items():
        if claim not in manifests.names("PersistentVolumeClaim"):
            yield f"{', '.join(sorted(pods))}: there is no PersistentVolumeClaim/{claim}"
        elif len(pods) > 1 and manifests.get("PersistentVolumeClaim", claim)["spec"]["accessModes"] != [
            "ReadWriteMany"
        ]:
            yield f"PersistentVolumeClaim/{claim}: {len(pods)} kinds of pods mount it, and it is not ReadWriteMany"
    yield from (
        f"PersistentVolumeClaim/{name}: no pod mounts it"
        for name in manifests.names("PersistentVolumeClaim") - set(claimed)
    )


def selectors(manifests: Manifests) -> Iterator[str]:
    """Services, workloads, budgets and policies select pods that there are."""
    pods = manifests.pods()
    for each in manifests.of("Service"):
        found = [pod for pod in pods if selects({"matchLabels": each["spec"]["selector"]}, pod.labels)]
        if not found:
            yield f"{named(each)}: selects no pod"
        for port in each["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            if any(target not in ports_of(pod) for pod in found):
                yield f"{named(each)}: port {target} is no port of {', '.join(pod.name for pod in found)}"
    for each in manifests.of("Deployment", "StatefulSet"):
        if not selects(each["spec"]["selector"], each["spec"]["template"]["metadata"].get("labels", {})):
            yield f"{named(each)}: its selector does not fit its own pods"
        if each["kind"] == "StatefulSet" and each["spec"]["serviceName"] not in manifests.names("Service"):
            yield f"{named(each)}: there is no Service/{each['spec']['serviceName']}"
    for each in manifests.of("PodDisruptionBudget"):
        if not any(selects(each["spec"]["selector"], pod.labels) for pod in pods):
            yield f"{named(each)}: selects no pod"
        if not isinstance(each["spec"].get("minAvailable"), int):
            yield f"{named(each)}: only minAvailable, as a number, is known of pods that the operator owns"
    covered = [each["spec"]["selector"] for each in manifests.of("PodDisruptionBudget")]
    for pod in pods:
        stays = pod.component not in ("bootstrap", "submitter") and "gpu" not in pod.name and "cpu" not in pod.name
        if stays and not any(selects(selector, pod.labels) for selector in covered):
            yield f"{pod.name}: no PodDisruptionBudget"


def variables_in_order(manifests: Manifests) -> Iterator[str]:
    """A variable that another's value names, $(NAME), stands before it; none is given twice."""
    for pod in manifests.pods():
        for container in pod.containers:
            before: set[str] = set()
            for variable in container.get("env", ()):
                for name in re.findall(r"\$\((\w+)\)", str(variable.get("value", ""))):
                    if name not in before:
                        yield f"{pod.name} {container['name']}: {variable['name']} names {name}, which is set later"
                if variable["name"] in before:
                    yield f"{pod.name} {container['name']}: {variable['name']} is given twice"
                before.add(variable["name"])


def _variables(manifests: Manifests) -> Iterator[tuple[Pod, Mapping[str, Any], Mapping[str, Any]]]:
    for pod in manifests.pods():
        for container in pod.containers:
            for variable in container.get("env", ()):
                yield pod, container, variable


def _references(value: Any, kind: str, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping under a key, with the name of the object that it is in."""
    if isinstance(value, Manifests):
        for each in value.objects:
            yield from _references(each, kind, named(each))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if key == kind:
                yield where, each
            yield from _references(each, kind, where)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each, kind, where)


def _templates(manifests: Manifests, pod: Pod) -> set[str]:
    for each in manifests.of("StatefulSet"):
        if named(each) == pod.name:
            return {claim["metadata"]["name"] for claim in each["spec"].get("volumeClaimTemplates", ())}
    return set()


def _config_maps(volume: Mapping[str, Any]) -> Iterator[str]:
    sources = [volume, *volume.get("projected", {}).get("sources", ())]
    yield from (source["configMap"]["name"] for source in sources if "configMap" in source)
