"""Trains one model with Ray Train: `python -m cluster.train --recipe digits --workers 2`."""

import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import ray.train
import ray.train.torch
import ray.util
import tyro
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer

from cluster import command_line, measure, messages, progress, registry, run_folder, session, shared_storage, tracking
from cluster.failures import Retries, TrainingError, as_training_error
from cluster.progress import Poster
from cluster.run_folder import Record, RunFolder
from cluster.tracking import Store, import_ahead, unsent_warning
from cluster.worker import Job, tracked, work
from dml import checkpoint
from dml.config import Config
from dml.state import State

_RESOURCES = ("workers", "cpus_per_worker", "gpus_per_worker")


@dataclass(frozen=True)
class Trained:
    """A training that has ended.

    Attributes:
        metrics: the last report of `cluster.worker.work`.
        checkpoint: path or URI of the best epoch's checkpoint.
    """

    metrics: dict[str, Any]
    checkpoint: str


PLACEMENT_GROUP = "placement_group"
"""Reported beside the metrics: the id, in hex, of the placement group that holds the workers."""


def fit(
    job: Job,
    resources: session.Resources,
    folder: RunFolder,
    *,
    callbacks: Sequence[ray.train.UserCallback] = (),
    followed: bool = False,
) -> Trained:
    """Trains over Ray workers, DDP by NCCL on GPUs and gloo on CPUs, and goes on from what is in the folder.

    Workers that are lost are started anew and go on from the newest checkpoint (`cluster.failures`).

    Args:
        job: what to train.
        resources: how many workers, with what each.
        folder: where its checkpoints are and will be.
        callbacks: Ray Train's user callbacks.
        followed: the workers tell how far they are, for `cluster.progress.Progress.following`, which must be open:
            else nobody would take their messages out of Ray's control store.

    Raises:
        TrainingError: it cannot go on; the message carries a rank and its error.
    """
    assert job.run is not None
    if why := folder.mend():
        command_line.warn(f"Ray Train's list of checkpoints is set aside: {why}")
    listener = job.run.run_id if followed else ""
    trainer = TorchTrainer(
        cast(Any, _worker),  # typed as one that returns nothing
        train_loop_config={"job": job, "folder": folder, "listener": listener},
        scaling_config=resources.scaling(),
        torch_config=resources.backend(),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=folder.storage,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=run_folder.KEPT, checkpoint_score_attribute=run_folder.RANK
            ),
            failure_config=ray.train.FailureConfig(max_failures=-1),  # Retries says when it is enough
            # Typed as the callbacks of Ray's first Train API.
            callbacks=cast(Any, [*callbacks, Retries(run_id=listener)]),
        ),
    )
    return Trained(cast(Any, finish(trainer)).return_value, folder.best())


def finish(trainer: TorchTrainer) -> ray.train.Result:
    """Runs a trainer to its end.

    Raises:
        TrainingError: it failed; the message carries a rank and the last line of its error.
    """
    try:
        return trainer.fit()
    except ray.train.ControllerError as failed:
        if isinstance(failed.controller_failure, TrainingError):
            raise failed.controller_failure from None
        raise TrainingError(f"Ray Train: {str(failed.controller_failure).strip().splitlines()[-1]}") from failed
    except ray.train.WorkerGroupError as failed:
        rank, error = next(iter(failed.worker_failures.items()))
        last = str(error).strip().splitlines()[-1]
        raise TrainingError(f"rank {rank}: {last}") from failed


def _worker(settings: dict[str, Any]) -> dict[str, float | str]:
    """What Ray Train calls in each worker, at first and after each failure."""
    job: Job = settings["job"]
    me = ray.train.get_context().get_world_rank()

    def report(metrics: dict[str, float | str], folder: Path | None) -> None:
        kept = ray.train.Checkpoint.from_directory(folder) if folder is not None else None
        name = run_folder.checkpoint_name(int(metrics["step"]))
        ray.train.report({**metrics, **place}, checkpoint=kept, checkpoint_dir_name=name)

    group = ray.util.get_current_placement_group()
    place = {} if group is None else {PLACEMENT_GROUP: group.id.hex()}
    assert job.run is not None
    listener: str = settings["listener"]
    poster = Poster(listener, job.config)
    try:
        resume = _newest(settings["folder"], me, listener)
        return work(job, report, device=session.use_rank_device(), seen=poster, resume=resume, every=True)
    except Exception as error:
        raise as_training_error(me, error) from error
    finally:
        if me == 0:
            poster.unsent(job.run)


def _newest(folder: RunFolder, me: int, listener: str) -> State | None:
    """The state that the first rank finds newest, on every rank."""
    if me == 0:
        found = folder.newest()
        for problem in found.unusable:
            messages.post(listener, {"warning": f"{problem}; the checkpoint before it is used"})
        broadcast_from_rank_zero(found.name)
        return found.state
    name = broadcast_from_rank_zero("")
    return folder.state(name) if name else None


@dataclass(frozen=True)
class Options:
    """Trains an encoder with Ray Train and tracks it in MLflow.

    Every setting of the recipe can be changed by its name, e.g. --loss.name contrastive --optim.lr 3e-4.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    workers: str = "1"
    """Ranks that train together by DDP. MIN:MAX is elastic: as many as there is room for, fewer when nodes go and more
    when they come, from the newest checkpoint each time; the global batch stays."""
    resize_seconds: float = 60.0
    """With --workers MIN:MAX, seconds between two looks for room to grow."""
    cpus_per_worker: float | None = None
    """CPUs of each rank; unless given, its GPU's share of the node's, or 1 without GPUs."""
    gpus_per_worker: float | None = None
    """GPUs of each rank; 1 when the cluster has GPUs, else 0."""
    init: str = ""
    """Starts from the encoder of a checkpoint folder, models:/NAME@ALIAS or models:/NAME/VERSION, on any classes."""
    resume: str = ""
    """Name of a run that was interrupted and goes on, with its own settings; the number of workers may be another."""
    name: str = ""
    """Names the run in MLflow and its folder; a time stamp is added when unset."""
    storage: str = ""
    """Where checkpoints go: a path that every node sees, or a URI. Default: runs/ray."""
    figures: bool = True
    """At the end, measure the best checkpoint on val in more ways, and draw figures, for MLflow."""
    quiet: bool = False
    """Print errors, warnings and the last line only."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    resumed = command_line.value_of(words, "--resume")
    options = command_line.parse(Options, words) if not resumed else _resumed(words, resumed)
    with command_line.one_line_errors(status=2):
        storage = session.kept_storage(options.storage)
    splits = command_line.preflight(options.config, options.workers)
    shown = progress.Progress(options.config, quiet=options.quiet)
    import_ahead()
    session.connect()
    with command_line.one_line_errors():
        resources = session.Resources.of(
            options.workers,
            options.cpus_per_worker,
            options.gpus_per_worker,
            resize_seconds=options.resize_seconds,
        )
        shared_storage.check(storage)
        shared_storage.check_runs(tracking.connect())
        folder, job = _begin(options, storage) if not resumed else _go_on(options, storage)
        shown.begin(folder.name, splits, resources.counts)
        try:
            with tracked(job, patience=0) as job:
                assert job.run is not None
                with shown.following(job.run.run_id):
                    trained = fit(job, resources, folder, followed=True)
                    if trained.checkpoint:
                        measure.keep_best(job.run, trained.checkpoint, resources, figures=options.figures)
        except (KeyboardInterrupt, SystemExit):  # the latter is how Ray Train answers Ctrl-C
            again = f" --storage {options.storage}" if options.storage else ""
            print(f"interrupted: python -m cluster.train --resume {folder.name}{again} goes on", flush=True)
            return 130
    shown.end(trained.metrics, trained.checkpoint or "none", job.run, toy=splits.toy)
    if warning := unsent_warning(job.run.unsent):
        command_line.warn(warning)
    return 0


def _say(options: Options, line: str) -> None:
    if not options.quiet:
        print(line, flush=True)


def _job(options: Options, storage: str, name: str, key: str) -> Job:
    store = Store.open(storage if options.storage else "")
    return Job(options.config, name, store, key=key, tags={"kind": "train"})


def _begin(options: Options, storage: str) -> tuple[RunFolder, Job]:
    """A new run, with its record."""
    name = command_line.run_name(options.name, options.config.data.dataset)
    folder = RunFolder(storage, name)
    key = f"{name}/{uuid.uuid4().hex}"
    job = _job(options, storage, name, key)
    if options.init:
        job = _warm(job, options.init)
    asked = {field: getattr(options, field) for field in _RESOURCES}
    folder.begin(Record(options.config, key, job.init_from, asked))
    return folder, job


def _warm(job: Job, init: str) -> Job:
    """The job with first weights; an alias is pinned to the version that it points to now."""
    folder, name = registry.fetch(init)
    source = registry.pinned(name) if init.startswith("models:") else session.local_path(init)
    return replace(job, init=checkpoint.warm_start(checkpoint.load(folder), job.config), init_from=source)


def _resumed(words: Sequence[str], name: str) -> Options:
    """The options of a run that goes on; what is given beside --resume must be what it began with."""
    with command_line.one_line_errors(status=2):
        record = RunFolder(session.storage(command_line.value_of(words, "--storage")), name).record()
        return command_line.goes_on(Options(record.config, **record.resources), words, "run")


def _go_on(options: Options, storage: str) -> tuple[RunFolder, Job]:
    """The run as it was left, told to whoever resumes it."""
    folder = RunFolder(storage, options.resume)
    record = folder.record()
    job = _job(options, storage, options.resume, record.key)
    found = folder.newest()
    for problem in found.unusable:
        command_line.warn(f"{problem}; the checkpoint before it is used")
    if found.state is not None:
        _say(options, f"{options.resume} goes on after step {found.state.progress.step}, from {found.name}")
        return folder, replace(job, init_from=record.init)
    _say(options, f"{options.resume} begins anew: it has no checkpoint yet")
    return folder, _warm(job, record.init) if record.init else job


if __name__ == "__main__":
    raise SystemExit(main())
