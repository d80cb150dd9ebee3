"""All rules of the manifests; each is a function of them that says what is wrong."""

from collections.abc import Callable, Iterator

from cluster import bootstrap
from tests.k8s import kuberay, network, pods, programs, references, schemas
from tests.k8s.manifests import Manifests

Rule = Callable[[Manifests], Iterator[str]]


def secrets(manifests: Manifests) -> Iterator[str]:
    """Secrets that are named are those of the bootstrap Job."""
    return references.secrets(manifests, bootstrap.SECRETS)


RULES: tuple[Rule, ...] = (
    schemas.kubernetes,
    schemas.kuberay,
    references.namespaces,
    references.no_credential,
    secrets,
    references.role_bindings,
    references.volumes,
    references.selectors,
    references.variables_in_order,
    pods.restricted,
    pods.resources,
    pods.probes,
    pods.images,
    pods.ray_versions,
    pods.writable,
    kuberay.names,
    kuberay.clusters,
    kuberay.jobs,
    kuberay.environments,
    programs.commands,
    programs.variables,
    programs.databases,
    programs.mlflow,
    programs.endpoint,
    network.open_at_both_ends,
    network.nothing_else,
)


def faults(manifests: Manifests) -> Iterator[str]:
    """What any rule says; one that cannot even read the manifests says that."""
    for rule in RULES:
        try:
            yield from rule(manifests)
        except (KeyError, TypeError, AttributeError, ValueError, StopIteration, RuntimeError, AssertionError) as error:
            yield f"{rule.__name__} cannot read them: {type(error).__name__}: {error}"
