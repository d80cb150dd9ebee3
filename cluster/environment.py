"""Where and with what a run was made: versions, hardware, and the commit of the working directory."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

PACKAGES = ("onethreshold", "torch", "torchvision", "timm", "ray", "mlflow", "numpy")


def commit(folder: Path) -> dict[str, str]:
    """MLflow's tag of the commit that a folder is at, and git.dirty: whether tracked files differ from it.

    Empty where the folder is in no git repository, or git is not installed.
    """
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": head, "git.dirty": str(bool(changed)).lower()}


def describe() -> dict[str, str]:
    """Tags of this process's machine: env.python, env.torch, ..., env.host, env.cpu, env.memory, env.gpu."""
    tags = {"python": platform.python_version(), "os": platform.platform(), "host": platform.node()}
    for package in PACKAGES:
        try:
            tags[package] = version(package)
        except PackageNotFoundError:
            continue
    tags["cpu"] = f"{psutil.cpu_count()} x {_cpu()}"
    tags["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        tags |= {"gpu": ", ".join(names), "cuda": str(torch.version.cuda)}
    return {f"env.{name}": value for name, value in tags.items()}


def _cpu() -> str:
    """The processor's name as its maker gives it, else the architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(  # noqa: S603  # fixed words, no shell
        ["git", "-C", str(folder), *words],  # noqa: S607  # the person's own git
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()
