"""One question to every node of the cluster."""

import importlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PACKAGES = ("onethreshold", "ray", "torch", "mlflow", "optuna")


def alive() -> list[dict[str, Any]]:
    """The living nodes, as Ray tells them."""
    return [node for node in ray.nodes() if node["Alive"]]


def resources() -> list[dict[str, float]]:
    """What each living node has."""
    return [node["Resources"] for node in alive()]


def ask(
    question: Callable[..., Any], nodes: Sequence[Mapping[str, Any]], seconds: float, *given: str, **options: float
) -> Iterator[tuple[str, Any]]:
    """Calls a function of a module on each node, with the code that the node has itself.

    Args:
        question: of a module's top level.
        nodes: of `alive`.
        seconds: that all together have to answer.
        given: to the function.
        options: of the Ray task, such as num_gpus.

    Yields:
        Each node's address, and its answer: None when there was none in time, an exception when it raised one.
    """
    asked = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = _call.options(scheduling_strategy=here, **options).remote(
            question.__module__, question.__qualname__, *given
        )
        asked[task] = node["NodeManagerAddress"]
    ready = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)[0] if asked else []
    for task, address in asked.items():
        if task not in ready:
            ray.cancel(task)
            yield address, None
            continue
        try:
            yield address, ray.get(task)
        except Exception as error:  # whatever it was
            yield address, error


def versions() -> dict[str, str]:
    """Of Python and the packages that must be the same everywhere."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]  # +cpu and +cu130 are one release
        except PackageNotFoundError:
            found[package] = "none"
    return found


def compute() -> str:
    """Computes something on the GPU that Ray gave this task; the GPU's name and torch's CUDA.

    Raises:
        RuntimeError: it cannot, or computes something else.
    """
    import torch

    ones = torch.ones(2, 2, device="cuda")
    if (ones @ ones).sum().item() != 8:
        raise RuntimeError("the sum of a product of matrices of ones is wrong there")
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


@ray.remote(num_cpus=0, max_retries=0)
def _call(module: str, name: str, *given: str) -> Any:
    return getattr(importlib.import_module(module), name)(*given)
