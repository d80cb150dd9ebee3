"""Measures what a source names and writes it into a folder: metrics.json, figures/ and, if asked, embeddings.npz."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
import rich.progress
import torch

from cluster import command_line, session, subjects
from cluster.tracking import Run
from dml import checkpoint, evaluate, gather, report
from dml.data import arrays

PATIENCE = 900.0
"""Seconds that the end of a training waits for a place where its best checkpoint is measured, and for its figures."""


@dataclass(frozen=True)
class Parts:
    """What to measure and to write.

    Attributes:
        skip: parts to leave out.
        figures: draw the figures.
        save_embeddings: write embeddings.npz too.
        seed: of k-means, classification and the map.
    """

    skip: tuple[report.Part, ...] = ()
    figures: bool = True
    save_embeddings: bool = False
    seed: int = 0


def write(
    source: subjects.Source,
    out: Path,
    parts: Parts,
    *,
    device: torch.device,
    group: gather.Group | None = None,
    shown: bool = False,
) -> None:
    """Embeds and measures on all ranks; the first writes.

    Args:
        source: what to measure.
        out: a folder that is not there yet.
        parts: of what there is to do.
        device: where this rank computes.
        group: ranks that share the work.
        shown: with a progress bar, in a terminal.
    """
    with _progress(shown=shown) as progress:
        loaded = subjects.load(source, device=device, group=group, done=progress.embedded)
        found = _measure(loaded, source, parts, group, progress.part)
        if gather.rank(group) != 0:
            return
        out.mkdir(parents=True)
        content = {"title": loaded.title, "prefix": loaded.prefix, "calibrated_on": loaded.points_from}
        content |= {"distance": loaded.config.distance, **found.as_dict(loaded.prefix)}
        (out / "metrics.json").write_text(json.dumps(content, indent=2, allow_nan=False))
        if parts.save_embeddings and loaded.subject is not None:
            subject = loaded.subject
            arrays.write(out / "embeddings.npz", subject.embeddings_ND, subject.labels_N, subject.classes)
        if parts.figures:
            (out / "figures").mkdir()
            progress.part("figures")
            for name, figure in report.figures(
                found, loaded.subject, loaded.config, points=loaded.points, seed=parts.seed
            ):
                figure.savefig(out / "figures" / f"{name}.png", dpi=130)


def keep_best(run: Run, path: str, resources: session.Resources, *, figures: bool) -> None:
    """Notes where the best checkpoint lies, and measures it where the training ran; no failure there undoes the run.

    Args:
        run: of the training.
        path: path or URI of the checkpoint folder.
        resources: of the training; measuring takes those of one worker.
        figures: measure it at all.
    """
    with run.writing() as record:
        record.tags({"checkpoint": path})
    if not figures:
        return
    task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker)(_record_best)
    running = task.remote(run, path)
    try:
        ray.get(running, timeout=PATIENCE)
    except (ray.exceptions.RayError, TimeoutError) as error:
        ray.cancel(running, force=True)
        reason = (str(error).strip() or "no place was free").splitlines()[-1]
        command_line.warn(f"figures of {path} are missing ({reason}); python -m cluster.evaluate --model {path}")


def _record_best(run: Run, path: str) -> None:
    """Measures a checkpoint on val, as a Ray task, and adds what it finds to the MLflow run of the training.

    Figures and metrics.json become artifacts under evaluation/; what the training did not follow, such as map@r and
    auc, becomes metrics at the checkpoint's step.
    """
    device = session.use_device()
    with ray.train.Checkpoint(path).as_directory() as folder, tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "evaluation"
        source = subjects.Source(model=str(folder), split="val")
        write(source, out, Parts(skip=("clustering", "classification")), device=device)
        found = json.loads((out / "metrics.json").read_text())["metrics"]
        step = int(checkpoint.load(folder).info["step"])
        known = {f"val/{name}" for name in evaluate.MEASURES}
        with run.writing() as record:
            record.metrics({step: {k: v for k, v in found.items() if k not in known and v is not None}})
            record.files(out, "evaluation")


def _measure(
    loaded: subjects.Loaded,
    source: subjects.Source,
    parts: Parts,
    group: gather.Group | None,
    doing: Callable[[str], None],
) -> report.Report:
    if loaded.pairs is not None:
        return report.measure_pairs(loaded.pairs, loaded.config, points=loaded.points, far=source.far)
    assert loaded.subject is not None
    return report.measure(
        loaded.subject,
        loaded.config,
        points=loaded.points,
        far=source.far,
        skip=parts.skip,
        seed=parts.seed,
        group=group,
        doing=doing,
    )


class _Progress:
    """What a person sees meanwhile, on a terminal: the part at work, and images embedded."""

    def __init__(self, bar: rich.progress.Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("reading", total=None)

    def embedded(self, images: int, total: int) -> None:
        self._bar.update(self._task, description="embedding", completed=images, total=total)

    def part(self, name: str) -> None:
        self._bar.update(self._task, description=name, completed=0, total=None)


@contextmanager
def _progress(*, shown: bool) -> Iterator[_Progress]:
    columns = ("{task.description:14}", rich.progress.BarColumn(), rich.progress.TimeElapsedColumn())
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
    ) as bar:
        yield _Progress(bar)
