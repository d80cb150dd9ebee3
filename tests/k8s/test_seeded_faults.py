"""Faults that people make, put into the manifests one at a time: each must be told, in words that name it."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.k8s import rules
from tests.k8s.manifests import Manifests

Change = Callable[[Manifests], None]
FAULTS: list[tuple[str, Change, str]] = []
"""Each with its name, how it is put in, and what must be said."""


def fault(said: str) -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        FAULTS.append((change.__name__, change, said))
        return change

    return add


@pytest.fixture(scope="module")
def manifests() -> Manifests:
    return Manifests.read()


def cluster(m: Manifests, kind: str, name: str) -> dict[str, Any]:
    return dict(m.clusters())[f"{kind}/{name}"]


def head(m: Manifests, kind: str, name: str) -> dict[str, Any]:
    return cluster(m, kind, name)["headGroupSpec"]["template"]["spec"]["containers"][0]


def workers(m: Manifests, kind: str, name: str) -> dict[str, Any]:
    return cluster(m, kind, name)["workerGroupSpecs"][-1]


def container(m: Manifests, kind: str, name: str) -> dict[str, Any]:
    return m.get(kind, name)["spec"]["template"]["spec"]["containers"][0]


def variable(of: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in of["env"] if each["name"] == name)


def policy(m: Manifests, name: str) -> dict[str, Any]:
    return m.get("NetworkPolicy", name)["spec"]


def serve_config(m: Manifests, change: Callable[[dict[str, Any]], None]) -> None:
    spec = m.get("RayService", "endpoint")["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    change(config)
    spec["serveConfigV2"] = yaml.safe_dump(config)


@fault("no Secret postgress with mlflow-password is made")
def a_wrong_secret_name(m: Manifests) -> None:
    variable(container(m, "Deployment", "mlflow"), "PGPASSWORD")["valueFrom"]["secretKeyRef"]["name"] = "postgress"


@fault("no Secret redis with passwd is made")
def a_wrong_secret_key(m: Manifests) -> None:
    options = cluster(m, "RayCluster", "training")["gcsFaultToleranceOptions"]
    options["redisPassword"]["valueFrom"]["secretKeyRef"]["key"] = "passwd"


@fault("Secrets do not belong here")
def a_secret_in_the_folder(m: Manifests) -> None:
    metadata = {"name": "ray", "namespace": "onethreshold"}
    m.objects.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"auth_token": "x"}})


@fault("MLFLOW_TRACKING_PASSWORD is a value, not of a Secret")
def a_password_in_the_open(m: Manifests) -> None:
    given = variable(head(m, "RayCluster", "training"), "MLFLOW_TRACKING_PASSWORD")
    given.pop("valueFrom")
    given["value"] = "hunter2"


@fault("a URL with a password")
def a_password_in_a_url(m: Manifests) -> None:
    variable(container(m, "Deployment", "mlflow"), "MLFLOW_BACKEND_STORE_URI")["value"] = (
        "postgresql+psycopg://mlflow:hunter2@postgres:5432/mlflow"
    )


@fault("authOptions.secretName is token")
def a_token_of_a_secret_that_nobody_makes(m: Manifests) -> None:
    cluster(m, "RayService", "endpoint")["authOptions"]["secretName"] = "token"


@fault("is more than it needs")
def a_role_that_may_list_secrets(m: Manifests) -> None:
    m.get("Role", "bootstrap")["rules"][1]["verbs"] = ["get", "list"]


@fault("there is no Role/boostrap")
def a_binding_to_no_role(m: Manifests) -> None:
    m.get("RoleBinding", "bootstrap")["roleRef"]["name"] = "boostrap"


@fault("there is no ServiceAccount/mlfow")
def an_account_that_there_is_not(m: Manifests) -> None:
    m.get("Deployment", "mlflow")["spec"]["template"]["spec"]["serviceAccountName"] = "mlfow"


@fault("gets a token of the API server")
def a_token_for_a_pod_that_needs_none(m: Manifests) -> None:
    m.get("StatefulSet", "redis")["spec"]["template"]["spec"].pop("automountServiceAccountToken")


@fault("2.6 is no str")
def an_unquoted_version(m: Manifests) -> None:
    cluster(m, "RayCluster", "training")["rayVersion"] = yaml.safe_load("2.60")


@fault("rayVersion is '2.59.0'")
def another_version_of_ray(m: Manifests) -> None:
    cluster(m, "RayJob", "search")["rayVersion"] = "2.59.0"


@fault("image onethreshold:0.1.0-ray2.59.0 is not onethreshold:0.1.0-ray2.60.0")
def another_image(m: Manifests) -> None:
    workers(m, "RayService", "endpoint")["template"]["spec"]["containers"][0]["image"] = "onethreshold:0.1.0-ray2.59.0"


@fault("image redis:latest has no exact version")
def an_image_of_any_version(m: Manifests) -> None:
    container(m, "StatefulSet", "redis")["image"] = "redis:latest"


@fault("port http is no port of Deployment/mlflow")
def a_missing_port(m: Manifests) -> None:
    container(m, "Deployment", "mlflow").pop("ports")


@fault("StatefulSet/postgres:0 TCP: no policy lets it in")
def a_port_that_the_service_has_not(m: Manifests) -> None:
    given = variable(head(m, "RayCluster", "training"), "ONETHRESHOLD_OPTUNA_STORAGE")
    given["value"] = "postgresql://optuna@postgres:5433/optuna"


@fault("maxReplicas: '8' is no int")
def replicas_as_a_string(m: Manifests) -> None:
    workers(m, "RayCluster", "training")["maxReplicas"] = "8"


@fault("'1' is not of type 'integer'")
def replicas_of_a_deployment_as_a_string(m: Manifests) -> None:
    m.get("Deployment", "mlflow")["spec"]["replicas"] = "1"


@fault("not minReplicas <= replicas <= maxReplicas")
def fewer_workers_than_the_least(m: Manifests) -> None:
    workers(m, "RayService", "endpoint")["minReplicas"] = 9


@fault("there is no field enableInTreeAutoscalling")
def a_typing_error_in_a_field_of_kuberay(m: Manifests) -> None:
    given = cluster(m, "RayCluster", "training")
    given["enableInTreeAutoscalling"] = given.pop("enableInTreeAutoscaling")


@fault("'redinessProbe' was unexpected")
def a_typing_error_in_a_pod_of_kuberay(m: Manifests) -> None:
    given = head(m, "RayCluster", "training")
    given["redinessProbe"] = given.pop("readinessProbe")


@fault("'volumeMount' was unexpected")
def a_typing_error_in_a_field_of_kubernetes(m: Manifests) -> None:
    given = container(m, "StatefulSet", "postgres")
    given["volumeMount"] = given.pop("volumeMounts")


@fault("no livenessProbe")
def a_missing_probe(m: Manifests) -> None:
    container(m, "StatefulSet", "redis").pop("livenessProbe")


@fault("readinessProbe asks port 8001, which it has not")
def a_probe_of_a_port_that_there_is_not(m: Manifests) -> None:
    given = workers(m, "RayService", "endpoint")["template"]["spec"]["containers"][0]
    given["readinessProbe"]["httpGet"]["port"] = 8001


@fault("limit of cpu 1 is below its request 500")
def a_limit_below_its_request(m: Manifests) -> None:
    container(m, "Deployment", "mlflow")["resources"] = {
        "requests": {"cpu": "500", "memory": "4Gi"},
        "limits": {"cpu": "1", "memory": "4Gi"},
    }


@fault("request and limit of memory differ")
def memory_that_the_object_store_cannot_count_on(m: Manifests) -> None:
    workers(m, "RayCluster", "training")["template"]["spec"]["containers"][0]["resources"]["requests"]["memory"] = "8Gi"


@fault("no request or no limit of memory")
def no_limit(m: Manifests) -> None:
    m.get("RayJob", "search")["spec"]["submitterPodTemplate"]["spec"]["containers"][0].pop("resources")


@fault("GPUs and the toleration of their nodes' taint go together")
def gpus_without_the_toleration(m: Manifests) -> None:
    workers(m, "RayJob", "search")["template"]["spec"].pop("tolerations")


@fault("runs as root")
def root(m: Manifests) -> None:
    m.get("Deployment", "mlflow")["spec"]["template"]["spec"]["securityContext"].pop("runAsNonRoot")


@fault("may gain privileges")
def privileges_of_the_autoscaler(m: Manifests) -> None:
    cluster(m, "RayCluster", "training")["autoscalerOptions"].pop("securityContext")


@fault("seccompProfile is not RuntimeDefault")
def no_seccomp(m: Manifests) -> None:
    workers(m, "RayService", "endpoint")["template"]["spec"]["securityContext"].pop("seccompProfile")


@fault("Services put variables such as MLFLOW_PORT into it")
def variables_of_services(m: Manifests) -> None:
    m.get("Deployment", "mlflow")["spec"]["template"]["spec"].pop("enableServiceLinks")


@fault("/tmp and /home/ray cannot be written")
def nowhere_to_write(m: Manifests) -> None:
    given = head(m, "RayJob", "search")
    given["volumeMounts"] = [each for each in given["volumeMounts"] if each["name"] != "tmp"]


@fault("mounts shard, which is no volume")
def a_volume_that_there_is_not(m: Manifests) -> None:
    head(m, "RayCluster", "training")["volumeMounts"][0]["name"] = "shard"


@fault("there is no PersistentVolumeClaim/sharded")
def a_claim_that_there_is_not(m: Manifests) -> None:
    volumes = workers(m, "RayJob", "search")["template"]["spec"]["volumes"]
    volumes[0]["persistentVolumeClaim"]["claimName"] = "sharded"


@fault("it is not ReadWriteMany")
def a_shared_volume_for_one_node(m: Manifests) -> None:
    m.get("PersistentVolumeClaim", "shared")["spec"]["accessModes"] = ["ReadWriteOnce"]


@fault("there is no ConfigMap/mlfow")
def a_config_map_that_there_is_not(m: Manifests) -> None:
    volumes = m.get("Deployment", "mlflow")["spec"]["template"]["spec"]["volumes"]
    next(each for each in volumes if "configMap" in each)["configMap"]["name"] = "mlfow"


@fault("Service/redis: selects no pod")
def a_service_of_no_pod(m: Manifests) -> None:
    m.get("Service", "redis")["spec"]["selector"]["app.kubernetes.io/component"] = "reddis"


@fault("its selector does not fit its own pods")
def a_selector_of_other_labels(m: Manifests) -> None:
    m.get("Deployment", "mlflow")["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"] = "tracking"


@fault("PodDisruptionBudget/endpoint-workers: selects no pod")
def a_budget_of_no_pod(m: Manifests) -> None:
    selector = m.get("PodDisruptionBudget", "endpoint-workers")["spec"]["selector"]
    selector["matchLabels"]["ray.io/node-type"] = "workers"


@fault("lies in default, not in onethreshold")
def another_namespace(m: Manifests) -> None:
    m.get("Service", "mlflow")["metadata"]["namespace"] = "default"


@fault("Deployment/mlflow -> StatefulSet/postgres:5432 TCP: no policy lets it out")
def a_forgotten_egress_rule(m: Manifests) -> None:
    policy(m, "mlflow")["egress"] = []


@fault("Deployment/mlflow -> StatefulSet/postgres:5432 TCP: no policy lets it in")
def a_forgotten_ingress_rule(m: Manifests) -> None:
    selector = policy(m, "postgres")["ingress"][0]["from"][0]["podSelector"]
    selector["matchExpressions"][0]["values"].remove("mlflow")


@fault("-> DNS:53 UDP: no policy lets it out")
def names_that_cannot_be_looked_up(m: Manifests) -> None:
    policy(m, "dns")["egress"][0]["ports"] = [{"port": 53, "protocol": "TCP"}]


@fault("RayCluster/training head -> the API server:6443 TCP: no policy lets it out")
def an_autoscaler_that_cannot_ask_for_pods(m: Manifests) -> None:
    policy(m, "ray-heads")["egress"][0]["ports"].pop()


@fault("the operator -> RayService/endpoint head:8265 TCP: no policy lets it in")
def an_endpoint_that_never_becomes_ready(m: Manifests) -> None:
    policy(m, "ray-heads")["ingress"][0]["from"][0].pop("namespaceSelector")


@fault("a client -> RayService/endpoint gpu workers:8000 TCP: no policy lets it in")
def an_endpoint_that_nobody_may_call(m: Manifests) -> None:
    policy(m, "endpoint")["ingress"].pop()


@fault("a stranger -> StatefulSet/postgres:5432: let in, and nothing needs it")
def a_database_for_everybody(m: Manifests) -> None:
    policy(m, "postgres")["ingress"][0].pop("from")


@fault("RayService/endpoint head -> StatefulSet/postgres:5432: let in, and nothing needs it")
def an_endpoint_that_may_reach_the_database(m: Manifests) -> None:
    selector = policy(m, "postgres")["ingress"][0]["from"][0]["podSelector"]
    selector["matchExpressions"][0]["values"].append("endpoint")


@fault("a stranger -> Deployment/mlflow:5000: let in, and nothing needs it")
def no_default_deny(m: Manifests) -> None:
    m.objects.remove(m.get("NetworkPolicy", "default-deny"))
    m.objects.remove(m.get("NetworkPolicy", "mlflow"))


@fault("at most 47 small letters")
def a_name_that_is_too_long(m: Manifests) -> None:
    m.get("RayService", "endpoint")["metadata"]["name"] = "endpoint-" * 6 + "x"


@fault("authOptions.mode is not token")
def a_cluster_for_everybody(m: Manifests) -> None:
    cluster(m, "RayCluster", "training").pop("authOptions")


@fault('num-cpus of the head is not "0"')
def work_on_the_head(m: Manifests) -> None:
    cluster(m, "RayCluster", "training")["headGroupSpec"]["rayStartParams"].pop("num-cpus")


@fault("RAY_REDIS_ADDRESS is for the operator to set")
def what_the_operator_sets(m: Manifests) -> None:
    head(m, "RayService", "endpoint")["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"})


@fault("autoscaler v2 wants restartPolicy Never")
def pods_that_restart(m: Manifests) -> None:
    workers(m, "RayCluster", "training")["template"]["spec"]["restartPolicy"] = "Always"


@fault("ttl without shutdown")
def a_cluster_that_stays(m: Manifests) -> None:
    m.get("RayJob", "search")["spec"].pop("shutdownAfterJobFinishes")


@fault("is not tried again")
def a_job_that_is_not_tried_again(m: Manifests) -> None:
    m.get("RayJob", "search")["spec"].pop("backoffLimit")


@fault("--storage /tmp/onethreshold is not on the shared volume")
def checkpoints_on_one_node(m: Manifests) -> None:
    spec = m.get("RayJob", "search")["spec"]
    spec["entrypoint"] = spec["entrypoint"].replace("/shared/", "/tmp/")


@fault("it would not go on by its name")
def a_search_that_begins_again(m: Manifests) -> None:
    spec = m.get("RayJob", "search")["spec"]
    spec["entrypoint"] = spec["entrypoint"].replace("--go-on ", "")


@fault("--trails")
def an_option_that_there_is_not(m: Manifests) -> None:
    m.get("RayJob", "search")["spec"]["entrypoint"] += " --trails 8"


@fault("No such option")
def an_option_that_mlflow_has_not(m: Manifests) -> None:
    container(m, "Deployment", "mlflow")["args"].append("--allow-hosts")


@fault("there is no program tune.serch")
def a_program_that_there_is_not(m: Manifests) -> None:
    spec = m.get("RayJob", "search")["spec"]
    spec["entrypoint"] = spec["entrypoint"].replace("tune.search", "tune.serch")


@fault("nobody reads ONETHRESHOLD_OPTUNA_STORE")
def a_variable_that_nobody_reads(m: Manifests) -> None:
    for each in (head(m, "RayJob", "search"), workers(m, "RayJob", "search")["template"]["spec"]["containers"][0]):
        variable(each, "ONETHRESHOLD_OPTUNA_STORAGE")["name"] = "ONETHRESHOLD_OPTUNA_STORE"


@fault("the environment of gpu is not that of the head")
def nodes_of_two_minds(m: Manifests) -> None:
    variable(head(m, "RayCluster", "training"), "MLFLOW_TRACKING_URI")["value"] = "http://mlflow.onethreshold:5000"


@fault("database tuna of optuna is not made")
def a_database_that_nobody_makes(m: Manifests) -> None:
    given = variable(head(m, "RayCluster", "training"), "ONETHRESHOLD_OPTUNA_STORAGE")
    given["value"] = "postgresql://optuna@postgres:5432/tuna"


@fault("PGPASSWORD is mlflow-password, the user optuna")
def the_password_of_another_user(m: Manifests) -> None:
    variable(head(m, "RayJob", "search"), "PGPASSWORD")["valueFrom"]["secretKeyRef"]["key"] = "mlflow-password"


@fault("MLflow does not answer by the name in http://mlflow:5000")
def a_host_that_is_not_allowed(m: Manifests) -> None:
    variable(container(m, "Deployment", "mlflow"), "MLFLOW_SERVER_ALLOWED_HOSTS")["value"] = "localhost:5000"


@fault("Deployment/mlflow: lets anybody in")
def an_mlflow_without_passwords(m: Manifests) -> None:
    container(m, "Deployment", "mlflow")["args"] = ["--host", "0.0.0.0"]


@fault("does not need to be MLflow's administrator")
def an_endpoint_that_is_the_administrator(m: Manifests) -> None:
    given = head(m, "RayService", "endpoint")
    variable(given, "MLFLOW_TRACKING_USERNAME")["value"] = "admin"


@fault("import_path serve.app:bild cannot be imported")
def a_wrong_import_path(m: Manifests) -> None:
    serve_config(m, lambda config: config["applications"][0].update(import_path="serve.app:bild"))


@fault("unknown option 'modell'")
def an_argument_that_there_is_not(m: Manifests) -> None:
    serve_config(m, lambda config: config["applications"][0]["args"].update(modell="models:/x@champion"))


@fault("there is no field routeprefix")
def a_typing_error_in_the_serve_config(m: Manifests) -> None:
    serve_config(m, lambda config: config["applications"][0].update(routeprefix="/"))


@fault("http_options is 127.0.0.1:8000")
def an_endpoint_on_loopback(m: Manifests) -> None:
    serve_config(m, lambda config: config["http_options"].update(host="127.0.0.1"))


@fault("fits onto no worker")
def a_replica_that_is_too_large(m: Manifests) -> None:
    serve_config(m, lambda config: config["applications"][0]["args"].update(gpus=2))


@fault("no gate before the endpoint")
def no_gate(m: Manifests) -> None:
    variable(head(m, "RayService", "endpoint"), "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH")["value"] = "serve.gates.x"


@fault("no API keys")
def no_keys(m: Manifests) -> None:
    given = head(m, "RayService", "endpoint")
    given["env"].remove(variable(given, "ONETHRESHOLD_KEYS"))


@pytest.mark.parametrize(("change", "said"), [each[1:] for each in FAULTS], ids=[each[0] for each in FAULTS])
def test_a_fault_is_told(change: Change, said: str, manifests: Manifests) -> None:
    changed = manifests.copied()
    change(changed)
    assert changed.objects != manifests.objects
    found = list(rules.faults(changed))
    assert [each for each in found if said in each], found


def test_a_key_given_twice_is_refused(tmp_path: Any) -> None:
    (tmp_path / "00.yaml").write_text("kind: Namespace\nmetadata: {name: a}\nkind: Service\n")
    with pytest.raises(yaml.constructor.ConstructorError, match="given twice: kind"):
        Manifests.read(tmp_path)
