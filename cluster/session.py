"""Connecting to Ray, and what a job may take of it."""

import logging
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchConfig

from cluster.nodes import resources
from cluster.tracking import runs_dir

_LOCAL_RAY = {
    # Ray would warn about settings of later releases at every start.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A process a CPU that no worker of Ray Train would take over, since theirs have an environment of their own.
    "RAY_prestart_worker_first_driver": "0",
    # A process that watches for notices that this machine is about to be taken away.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The environment variable by which Ray hands a job of `ray job submit` its name and runtime environment."""


def connect() -> None:
    """Joins the cluster at RAY_ADDRESS, or starts a local Ray on this machine; does nothing when connected already."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        for name, value in _LOCAL_RAY.items():
            os.environ.setdefault(name, value)
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


@dataclass(frozen=True)
class Resources:
    """What one job takes.

    Attributes:
        workers: ranks that train together; of an elastic job the fewest.
        cpus_per_worker: CPUs of each; also its threads.
        gpus_per_worker: GPUs of each; may be a fraction.
        most: ranks of an elastic job at most; 0 where their number is fixed.
        resize_seconds: between two looks of an elastic job for room to grow.
    """

    workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    most: int = 0
    resize_seconds: float = 60.0

    @classmethod
    def of(
        cls,
        workers: int | str,
        cpus_per_worker: float | None = None,
        gpus_per_worker: float | None = None,
        *,
        resize_seconds: float = 60.0,
    ) -> "Resources":
        """Resources with what is not given taken from the cluster.

        A GPU a worker when it has any, with its share of the CPUs of its node, which read the images; else a CPU a
        worker.

        Args:
            workers: how many, or "MIN:MAX" of an elastic job.
            cpus_per_worker: CPUs of each.
            gpus_per_worker: GPUs of each.
            resize_seconds: of an elastic job.

        Raises:
            ValueError: fewer than one worker, or more (at the least) than the cluster, as it is now, can ever hold.
        """
        least, most = span(workers)
        total = ray.cluster_resources()
        if gpus_per_worker is None:
            gpus_per_worker = 1.0 if total.get("GPU", 0) > 0 else 0.0
        if cpus_per_worker is None:
            cpus_per_worker = cpus_beside(resources(), gpus_per_worker)
        found = cls(least, cpus_per_worker, gpus_per_worker, most, resize_seconds)
        for name, each in (("CPU", found.cpus_per_worker), ("GPU", found.gpus_per_worker)):
            if least * each > total.get(name, 0):
                raise ValueError(
                    f"{least} workers with {each:g} {name} each need {least * each:g} {name}; "
                    f"the cluster has {total.get(name, 0):g}"
                )
        return found

    @property
    def counts(self) -> tuple[int, int]:
        """The fewest and the most ranks."""
        return self.workers, self.most or self.workers

    @property
    def per_worker(self) -> dict[str, float]:
        """Ray's resource request of one worker."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus}

    def scaling(self) -> ray.train.ScalingConfig:
        """Ray Train's form of these resources."""
        made: Any = ray.train.ScalingConfig  # typed as that of Ray's first Train API
        return cast(
            ray.train.ScalingConfig,
            made(
                num_workers=self.counts if self.most else self.workers,
                use_gpu=self.gpus_per_worker > 0,
                resources_per_worker=self.per_worker,
                elastic_resize_monitor_interval_s=self.resize_seconds,
            ),
        )

    def backend(self) -> TorchConfig:
        """How the ranks talk: by NCCL between GPUs, else by gloo."""
        return TorchConfig(backend="nccl" if self.gpus_per_worker else "gloo")


def cpus_beside(nodes: Sequence[Mapping[str, float]], gpus: float) -> float:
    """The CPUs that go with so many GPUs, where every GPU of a node is given its share: whole, at least 1.

    Args:
        nodes: the resources of each node; of those with GPUs, the one with the fewest CPUs a GPU decides.
        gpus: of one worker; 0 needs 1 CPU.
    """
    shares = [gpus * node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU", 0.0) > 0]
    return max(1.0, math.floor(min(shares))) if gpus > 0 and shares else 1.0


def span(workers: int | str) -> tuple[int, int]:
    """The fewest workers, and the most of an elastic job, else 0.

    Args:
        workers: how many, or "MIN:MAX".

    Raises:
        ValueError: it is neither, fewer than one worker, or the maximum is below the minimum.
    """
    least, colon, most = str(workers).partition(":")
    if not (least.isdecimal() and (most.isdecimal() or not colon)):
        raise ValueError(f"workers: {workers!r} is neither a number, such as 2, nor MIN:MAX, such as 1:4")
    if int(least) < 1:
        raise ValueError(f"workers: {workers} is too few; at least 1")
    if colon and int(most) < int(least):
        raise ValueError(f"workers: {workers} has its maximum below its minimum")
    return int(least), int(most) if colon and int(most) > int(least) else 0


def storage(given: str = "") -> str:
    """Where checkpoints and the state of searches go: what was given, made absolute, else runs/ray."""
    return local_path(given or str(runs_dir() / "ray"))


@contextmanager
def stopped_as_by_ctrl_c() -> Iterator[None]:
    """Makes SIGTERM, which `ray job stop` and Kubernetes send, end the block as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def submitted() -> bool:
    """Whether this process is the entrypoint of a job of `ray job submit`, whose folder Ray throws away."""
    return _JOB in os.environ


def kept_storage(given: str, *, writes: bool = True) -> str:
    """The storage of a program whose results must last: the one given, else runs/ray.

    Args:
        given: by option; empty when it is not.
        writes: False where MLflow alone keeps what the program leaves.

    Raises:
        ValueError: in a job, where no storage or a relative one is given, or MLflow's is not in the environment: what
            the job leaves in its folder would be lost.
    """
    if not submitted():
        return storage(given)
    missing = []
    if writes and not ("://" in given or Path(given).is_absolute()):
        missing.append("--storage with a URI or an absolute path that every node sees")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        missing.append(
            "MLFLOW_TRACKING_URI in the job's environment (--runtime-env-json "
            """'{"env_vars": {"MLFLOW_TRACKING_URI": "http://..."}}' of ray job submit)"""
        )
    if missing:
        raise ValueError(f"in a job runs/ lies in a folder that Ray throws away: give {' and '.join(missing)}")
    return storage(given)


def local_path(text: str) -> str:
    """A storage path made absolute, a URI (s3://...) left as it is: workers run in other folders."""
    return text if "://" in text else str(Path(text).absolute())


def use_device() -> torch.device:
    """The device that Ray gave this task or actor, with torch's threads set to its CPUs."""
    use_threads()
    # Ray shows a task or actor its own GPUs only, so they count from 0.
    return torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")


def use_rank_device() -> torch.device:
    """The device of this rank of Ray Train, made torch's current one, with torch's threads set to its CPUs."""
    use_threads()
    # Ray Train's workers see all GPUs of their node, and each is told its own.
    device: torch.device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def use_threads() -> None:
    """Sets torch's threads to the CPUs that Ray gave this process: Ray leaves them at one."""
    resources = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(1, int(resources.get("CPU", 1))))
