"""Rules of what runs in the pods: commands that programs read, variables that somebody reads, addresses that fit."""

import functools
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pydantic
import yaml
from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from cluster import bootstrap, command_line, doctor
from tests.k8s.manifests import ROOT, Manifests, named, text_of
from tests.k8s.pods import quantity
from tune import promote
from tune.options import Options

OURS = ("cluster", "dml", "serve", "tune")
OPTIONS: dict[str, Any] = {"cluster.doctor": doctor.Options, "tune.promote": promote.Options}
"""The options of programs, but for tune.search, which has a recipe."""
OF_IMAGES = {
    "postgres": {"PGDATA", "PGPASSWORD", "POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_INITDB_ARGS"},
    "redis": {"REDISCLI_AUTH"},
}
"""Variables that an image of others reads."""


def commands(manifests: Manifests) -> Iterator[str]:
    """Every command is one that its program reads."""
    for where, words in _commands(manifests):
        if words[:2] == ["python", "-m"]:
            if fault := python_fault(words[2], words[3:]):
                yield f"{where}: {fault}"
        elif words[:2] == ["mlflow", "server"]:
            yield from (f"{where}: {fault}" for fault in _mlflow(words[2:]))
        elif words[0] not in ("sh", "pg_isready"):
            yield f"{where}: nobody knows {words[0]}"


def variables(manifests: Manifests) -> Iterator[str]:
    """Every variable is read by somebody: by our programs, by Ray, by MLflow, by libpq or by the image."""
    for pod in manifests.pods():
        read = OF_IMAGES.get(pod.component, {"PGPASSWORD"}) | _ours() | _theirs()
        init = " ".join(text_of([each["data"] for each in manifests.of("ConfigMap")]))
        for container in pod.containers:
            for variable in container.get("env", ()):
                if variable["name"] not in read and not re.search(rf"\b{variable['name']}\b", init):
                    yield f"{pod.name} {container['name']}: nobody reads {variable['name']}"


def databases(manifests: Manifests) -> Iterator[str]:
    """Whoever names a database has it made, as its owner, and has that user's password."""
    init = manifests.get("ConfigMap", "postgres")["data"]["init.sh"]
    for pod in manifests.pods():
        maps = [each["configMap"]["name"] for each in pod.spec.get("volumes", ()) if "configMap" in each]
        files = [manifests.get("ConfigMap", name)["data"] for name in maps if name in manifests.names("ConfigMap")]
        for container in pod.containers:
            words = " ".join(text_of([container.get("env"), *files]))
            for user, database in re.findall(r"postgresql\S*://(\w+)@postgres:5432/(\w+)", words):
                if f"CREATE DATABASE {database} OWNER {user};" not in init or f"CREATE ROLE {user} LOGIN" not in init:
                    yield f"{pod.name}: database {database} of {user} is not made by ConfigMap/postgres"
                key = _variable(container, "PGPASSWORD").get("valueFrom", {}).get("secretKeyRef", {}).get("key")
                if key != f"{user}-password":
                    yield f"{pod.name} {container['name']}: PGPASSWORD is {key}, the user {user}"


def mlflow(manifests: Manifests) -> Iterator[str]:
    """MLflow asks for passwords, and answers by every name that it is called by."""
    server = manifests.get("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"][0]
    allowed = str(_variable(server, "MLFLOW_SERVER_ALLOWED_HOSTS").get("value", "")).split(",")
    if "basic-auth" not in server["args"] or "*" in allowed:
        yield "Deployment/mlflow: lets anybody in"
    for pod in manifests.pods():
        for container in pod.containers:
            uri = str(_variable(container, "MLFLOW_TRACKING_URI").get("value", ""))
            if uri and uri.partition("//")[2] not in allowed:
                yield f"{pod.name} {container['name']}: MLflow does not answer by the name in {uri}"
            user = _variable(container, "MLFLOW_TRACKING_USERNAME").get("value")
            password = _variable(container, "MLFLOW_TRACKING_PASSWORD").get("valueFrom", {}).get("secretKeyRef", {})
            if uri and (user not in ("admin", *bootstrap.USERS) or password.get("key") != f"{user}-password"):
                yield f"{pod.name} {container['name']}: MLflow's user {user} with {password.get('key')}"
            if user == "admin" and pod.component != "bootstrap":
                yield f"{pod.name} {container['name']}: does not need to be MLflow's administrator"


def endpoint(manifests: Manifests) -> Iterator[str]:
    """The Serve config is one that Ray Serve and serve.app take, on the port that the pods have."""
    for each in manifests.of("RayService"):
        name, spec = named(each), each["spec"]
        try:
            config = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
        except (pydantic.ValidationError, yaml.YAMLError) as error:
            yield f"{name}: serveConfigV2: {error}"
            continue
        yield from (f"{name}: serveConfigV2: {fault}" for fault in _unknown(yaml.safe_load(spec["serveConfigV2"])))
        head = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        ports = {port["name"]: port["containerPort"] for port in head["ports"]}
        if (config.http_options.host, config.http_options.port) != ("0.0.0.0", ports.get("serve")):
            yield f"{name}: http_options is {config.http_options.host}:{config.http_options.port}, the pods' {ports}"
        for application in config.applications:
            yield from (f"{name}: {fault}" for fault in _application(application.import_path, application.args))
            yield from (f"{name}: {fault}" for fault in _room(spec["rayClusterConfig"], application.args))
        gate = _variable(head, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH").get("value", "")
        if not callable(_attribute(str(gate).rpartition(".")[0], str(gate).rpartition(".")[2])):
            yield f"{name}: no gate before the endpoint: {gate!r} cannot be imported"
        if "valueFrom" not in _variable(head, "ONETHRESHOLD_KEYS"):
            yield f"{name}: no API keys"
        if "upgradeStrategy" not in spec:
            yield f"{name}: no upgradeStrategy"


def _unknown(config: Mapping[str, Any]) -> Iterator[str]:
    """Fields that Serve would pass over in silence."""
    parts = [(config, ServeDeploySchema), (config.get("http_options", {}), HTTPOptionsSchema)]
    parts += [(each, ServeApplicationSchema) for each in config["applications"]]
    for part, schema in parts:
        yield from (f"there is no field {field}" for field in part if field not in schema.model_fields)


def _application(import_path: str, args: Mapping[str, Any]) -> Iterator[str]:
    build = _attribute(*import_path.split(":", 1)) if ":" in import_path else None
    if build is None:
        yield f"import_path {import_path} cannot be imported"
        return
    try:
        build(dict(args))
    except (ValueError, TypeError) as error:
        yield f"{import_path} refuses its args: {error}"


def _room(cluster: Mapping[str, Any], args: Mapping[str, Any]) -> Iterator[str]:
    """A replica fits onto a worker, and the most replicas onto the most workers."""
    group = cluster["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    most = int(str(args.get("replicas", "1")).rpartition(":")[2])
    for kind, needed in (("cpu", args.get("cpus", 1)), ("nvidia.com/gpu", args.get("gpus", 0))):
        fit = quantity(limits.get(kind, 0)) // needed if needed else most
        if not fit:
            yield f"a replica with {needed} {kind} fits onto no worker"
        elif most > fit * group["maxReplicas"]:
            yield f"{most} replicas with {needed} {kind} do not fit onto {group['maxReplicas']} workers"


def python_fault(module: str, words: list[str]) -> str:
    """What `python -m MODULE WORDS` would say against its words; empty when it reads them."""
    if module == "cluster.bootstrap":
        return "" if words in (["secrets"], ["mlflow-users"]) else f"it does not know {shlex.join(words)}"
    said = StringIO()
    try:
        with redirect_stderr(said):
            if module == "tune.search":
                command_line.parse(Options, words, budget="short")
            elif module in OPTIONS:
                command_line.read(OPTIONS[module], words)
            else:
                return f"there is no program {module} whose options are known"
    except SystemExit:
        return said.getvalue().strip()
    return ""


def _mlflow(words: list[str]) -> Iterator[str]:
    import click
    from mlflow.cli import server

    try:
        server.make_context("mlflow server", list(words))
    except click.ClickException as error:
        yield error.format_message()


def _commands(manifests: Manifests) -> Iterator[tuple[str, list[str]]]:
    for each in manifests.of("RayJob"):
        yield named(each), shlex.split(each["spec"]["entrypoint"])
    for pod in manifests.pods():
        for container in pod.containers:
            if "command" in container:
                yield f"{pod.name} {container['name']}", [*container["command"], *container.get("args", ())]
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if "exec" in container.get(probe, {}):
                    yield f"{pod.name} {probe}", container[probe]["exec"]["command"]


def _variable(container: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((each for each in container.get("env", ()) if each["name"] == name), {})


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


@functools.cache
def _ours() -> set[str]:
    sources = [file.read_text() for package in OURS for file in (ROOT / package).rglob("*.py")]
    return {name for source in sources for name in re.findall(r'"(ONETHRESHOLD_[A-Z_]+)"', source)}


@functools.cache
def _theirs() -> set[str]:
    """The variables in the sources of MLflow and Ray where they read them."""
    found = set()
    for module, pattern in (
        ("mlflow.environment_variables", r'"(MLFLOW_[A-Z_]+)"'),
        ("mlflow.cli", r'"(MLFLOW_[A-Z_]+)"'),
        ("mlflow.utils.cli_args", r'"(MLFLOW_[A-Z_]+)"'),
        ("ray.serve._private.constants", r'"(RAY_[A-Z_]+)"'),
        ("ray._common.usage.usage_constants", r'"(RAY_[A-Z_]+)"'),
    ):
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        found |= set(re.findall(pattern, Path(str(spec.origin)).read_text()))
    return found
