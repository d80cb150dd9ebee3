"""Connecting to Ray, and what a job may take of it."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchConfig

from cluster.tracking import runs_dir


def connect() -> None:
    """Joins the cluster at RAY_ADDRESS, or starts a local Ray on this machine; does nothing when connected already."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        # Ray would warn about settings of later releases at every start.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


@dataclass(frozen=True)
class Resources:
    """What one job takes.

    Attributes:
        workers: ranks that train together.
        cpus_per_worker: CPUs of each; also its threads.
        gpus_per_worker: GPUs of each; may be a fraction.
    """

    workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0

    @classmethod
    def of(
        cls, workers: int, cpus_per_worker: float | None = None, gpus_per_worker: float | None = None
    ) -> "Resources":
        """Resources with what is not given taken from the cluster: a GPU a worker when it has any, a CPU a worker.

        Raises:
            ValueError: fewer than one worker, or more than the cluster, as it is now, can ever hold.
        """
        if workers < 1:
            raise ValueError(f"workers: {workers} is too few; at least 1")
        total = ray.cluster_resources()
        if gpus_per_worker is None:
            gpus_per_worker = 1.0 if total.get("GPU", 0) > 0 else 0.0
        found = cls(workers, cpus_per_worker or 1.0, gpus_per_worker)
        for name, each in (("CPU", found.cpus_per_worker), ("GPU", found.gpus_per_worker)):
            if workers * each > total.get(name, 0):
                raise ValueError(
                    f"{workers} workers with {each:g} {name} each need {workers * each:g} {name}; "
                    f"the cluster has {total.get(name, 0):g}"
                )
        return found

    @property
    def per_worker(self) -> dict[str, float]:
        """Ray's resource request of one worker."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus}

    def scaling(self) -> ray.train.ScalingConfig:
        """Ray Train's form of these resources."""
        return ray.train.ScalingConfig(
            num_workers=self.workers, use_gpu=self.gpus_per_worker > 0, resources_per_worker=self.per_worker
        )

    def backend(self) -> TorchConfig:
        """How the ranks talk: by NCCL between GPUs, else by gloo."""
        return TorchConfig(backend="nccl" if self.gpus_per_worker else "gloo")


def storage() -> str:
    """Where checkpoints and the state of searches go unless told otherwise: runs/ray."""
    return str(runs_dir() / "ray")


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
