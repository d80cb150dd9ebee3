"""From the winner of a search to the champion: test classes once, operating points, the registry."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from cluster import registry, session
from dml import checkpoint, evaluate
from dml.data import datasets
from dml.metrics import threshold


@dataclass(frozen=True)
class Tested:
    """A model on test classes.

    Attributes:
        metrics: test/recall@1, test/opis, ...
        curves: threshold curves of the test classes; None for a collapsed model, which no threshold fits.
        classes: how many classes were tested.
        operating_points: thresholds calibrated on val classes, as JSON-like dicts.
    """

    metrics: dict[str, float]
    curves: threshold.ThresholdCurves | None
    classes: int
    operating_points: tuple[dict[str, Any], ...]


def test(checkpoints: Sequence[str], resources: session.Resources) -> list[Tested]:
    """Embeds the test classes with each model, where the training ran, and calibrates it on val classes.

    Args:
        checkpoints: paths or URIs of checkpoint folders.
        resources: what one worker may take.
    """
    gpus = resources.gpus_per_worker
    task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=gpus)(_test)
    tested: list[Tested] = ray.get(task.remote(list(checkpoints)))
    return tested


def _test(checkpoints: list[str]) -> list[Tested]:
    device = session.use_device()
    tested = []
    for path in checkpoints:
        with ray.train.Checkpoint(path).as_directory() as folder:
            tested.append(test_model(Path(folder), device))
    return tested


def test_model(folder: Path, device: torch.device) -> Tested:
    """Measures a checkpoint on its test classes and calibrates it on its val classes."""
    model = checkpoint.load(folder)
    encoder, config = model.encoder.to(device), model.config
    splits = datasets.load(config.data)
    embeddings = evaluate.embed(encoder, splits.test, config, device=device)
    labels, known = torch.from_numpy(splits.test.labels_N), torch.from_numpy(splits.val.labels_N)
    metrics, curves = evaluate.metrics_and_curves(embeddings, labels, config.evaluate)
    points = evaluate.calibrate(evaluate.embed(encoder, splits.val, config, device=device), known, config.evaluate)
    return Tested(
        metrics={f"test/{name}": value for name, value in metrics.items()},
        curves=curves,
        classes=len(splits.test.classes),
        operating_points=tuple(asdict(point) for point in points),
    )


def register(path: str, tested: Tested, *, run_id: str) -> registry.ModelVersion:
    """Registers a checkpoint as a new version of `onethreshold` and moves the alias champion to it.

    Args:
        path: path or URI of the checkpoint folder.
        tested: its test figures and operating points.
        run_id: MLflow run that the model belongs to.
    """
    with ray.train.Checkpoint(path).as_directory() as folder:
        version = registry.register(
            Path(folder), run_id=run_id, operating_points=tested.operating_points, metrics=tested.metrics
        )
    registry.promote(version)
    return version
