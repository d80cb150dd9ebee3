"""Trains one model with Ray Train: `python -m cluster.train --recipe digits --workers 2`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import ray.train
import ray.train.torch
import ray.util
import tyro
from ray.train.torch import TorchTrainer

from cluster import command_line, session
from cluster.tracking import Store
from cluster.worker import Job, TrainingError, work
from dml.config import Config

PLACEMENT_GROUP = "placement_group"
"""Reported beside the metrics: the id, in hex, of the placement group that holds the workers."""


def fit(
    job: Job,
    resources: session.Resources,
    *,
    name: str,
    storage: str,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> ray.train.Result:
    """Trains over Ray workers, DDP by NCCL on GPUs and gloo on CPUs; the kept checkpoint is that of the best epoch.

    Args:
        job: what to train.
        resources: how many workers, with what each.
        name: names the run's folder under storage.
        storage: absolute path or URI that every node sees.
        callbacks: Ray Train's user callbacks.

    Raises:
        TrainingError: a worker failed; the message carries its rank and error.
    """
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        scaling_config=resources.scaling(),
        torch_config=resources.backend(),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=cast(Any, [*callbacks]),  # typed as the callbacks of Ray's first Train API
        ),
    )
    return finish(trainer)


def finish(trainer: TorchTrainer) -> ray.train.Result:
    """Runs a trainer to its end.

    Raises:
        TrainingError: a worker failed; the message carries its rank and the last line of its error.
    """
    try:
        return trainer.fit()
    except ray.train.WorkerGroupError as failed:
        rank, error = next(iter(failed.worker_failures.items()))
        last = str(error).strip().splitlines()[-1]
        raise TrainingError(f"rank {rank}: {last}") from failed


def _worker(settings: dict[str, Job]) -> None:
    def report(metrics: dict[str, float | str], folder: Path | None) -> None:
        kept = ray.train.Checkpoint.from_directory(folder) if folder is not None else None
        ray.train.report({**metrics, **place}, checkpoint=kept)

    group = ray.util.get_current_placement_group()
    place = {} if group is None else {PLACEMENT_GROUP: group.id.hex()}
    work(settings["job"], report, device=session.use_rank_device())


@dataclass(frozen=True)
class Options:
    """Trains an encoder with Ray Train and tracks it in MLflow.

    Every setting of the recipe can be changed by its name, e.g. --loss.name contrastive --optim.lr 3e-4.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    workers: int = 1
    """Ranks that train together by DDP."""
    cpus_per_worker: float | None = None
    """CPUs of each rank; 1 unless given."""
    gpus_per_worker: float | None = None
    """GPUs of each rank; 1 when the cluster has GPUs, else 0."""
    name: str = ""
    """Names the run in MLflow and its folder; a time stamp is added when unset."""
    storage: str = ""
    """Where checkpoints go: a path that every node sees, or a URI. Default: runs/ray."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = command_line.parse(Options, sys.argv[1:] if argv is None else argv)
    config = options.config
    splits = command_line.preflight(config)
    session.connect()
    with command_line.one_line_errors():
        resources = session.Resources.of(options.workers, options.cpus_per_worker, options.gpus_per_worker)
        store = Store.open()
        name = command_line.run_name(options.name, config.data.dataset)
        command_line.print_config(config)
        job = Job(config, name, store, tags={"kind": "train"})
        result = fit(job, resources, name=name, storage=session.local_path(options.storage or session.storage()))
    metrics = result.metrics or {}
    toy = "  (toy: two val classes say little about OPIS)" if splits.toy else ""
    figures = f"val Recall@1 {metrics['best/recall@1']:.4f}, OPIS {metrics['best/opis']:.5f}"
    print(f"best epoch {metrics['best/epoch']:g}: {figures}{toy}")
    print(f"checkpoint {result.checkpoint.path if result.checkpoint else 'none'}")
    print(f"MLflow run {metrics['run_id']} in {store.uri}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
