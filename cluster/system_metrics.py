"""What a training takes of its machine, under the names that MLflow's UI shows as system metrics."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch

from cluster.periodically import periodically
from cluster.writer import Writer

EVERY = 10.0
"""Seconds between two samples."""
MIB = 2**20


@contextmanager
def sampling(record: Writer, began: int, device: torch.device, *, every: float = EVERY) -> Iterator[None]:
    """Records a sample every few seconds while the block runs, on a thread of its own.

    Args:
        record: of the run.
        began: when the run was first started, in milliseconds since 1970; the step of a sample is the seconds since.
        device: that the training computes on.
        every: seconds between samples.
    """
    sample(device)  # the first use of the processors is that since the last question
    with periodically(
        "system-metrics", every, lambda: record.metrics({int(time.time() - began / 1000): sample(device)})
    ):
        yield


def sample(device: torch.device) -> dict[str, float]:
    """The machine's use of processors (percent of all, since the last call) and memory, and this process's memory.

    Of a GPU also its memory, and its utilisation where NVIDIA's nvidia-ml-py is installed and the GPU is not divided.
    """
    memory = psutil.virtual_memory()
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MIB,
        "system_memory_usage_percentage": memory.percent,
        "process_memory_usage_megabytes": psutil.Process().memory_info().rss / MIB,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        values[f"gpu_{device.index}_memory_usage_megabytes"] = (total - free) / MIB
        values[f"gpu_{device.index}_memory_usage_percentage"] = 100 * (total - free) / total
        with suppress(Exception):  # of NVML, which need not be there to be asked
            values[f"gpu_{device.index}_utilization_percentage"] = float(torch.cuda.utilization(device))
    return {f"system/{name}": value for name, value in values.items()}
