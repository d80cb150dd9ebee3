"""Models on test classes, which are embedded once: figures, thresholds from val classes, and what these do there."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch

from cluster import session
from dml import checkpoint, evaluate
from dml.data import datasets
from dml.metrics import threshold
from dml.metrics.distance_histograms import DistanceHistograms
from dml.metrics.pair_distances import pair_distances
from dml.metrics.transfer import transfer

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Tested:
    """A model on test classes.

    Attributes:
        metrics: test/recall@1, test/opis, ...
        curves: threshold curves of the test classes; None for a collapsed model, which no threshold fits.
        classes: how many classes were tested.
        operating_points: thresholds calibrated on val classes, as JSON-like dicts.
        transfers: what each of them does to the test classes (`dml.metrics.transfer`), as JSON-like dicts.
        worst: class and utility of the test classes whose mean utility over the calibration range is lowest, the lowest
            first.
        sizes: by split, how many classes and images it has.
        fingerprint: of the data as they were read for this test.
        toy: too few classes are held out for OPIS to mean much.
        distances: the pairs of val classes that the operating points were calibrated on
            (`dml.metrics.distance_histograms`), as a JSON-like dict; None without operating points.
    """

    metrics: dict[str, float]
    curves: threshold.ThresholdCurves | None
    classes: int
    operating_points: tuple[dict[str, Any], ...]
    transfers: tuple[dict[str, Any], ...] = ()
    worst: tuple[tuple[str, float], ...] = ()
    sizes: dict[str, tuple[int, int]] | None = None
    fingerprint: str = ""
    toy: bool = False
    distances: dict[str, Any] | None = None


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
    """Measures a checkpoint on its test classes, and puts thresholds to the test there that its val classes gave.

    Neither were trained on: with data.train_on_val, val is what that leaves.
    """
    model = checkpoint.load(folder)
    encoder, config = model.encoder.to(device), model.config
    splits = datasets.load(config.data)
    embeddings = evaluate.embed(encoder, splits.test, config, device=device)
    labels, known = torch.from_numpy(splits.test.labels_N), torch.from_numpy(splits.val.labels_N)
    metrics, curves = evaluate.metrics_and_curves(embeddings, labels, config.evaluate)
    known_embeddings = evaluate.embed(encoder, splits.val, config, device=device)
    points = evaluate.calibrate(known_embeddings, known, config.evaluate)
    held = transfer(points, embeddings, labels, names=splits.test.classes)
    parts = {name: getattr(splits, name) for name in SPLITS}
    return Tested(
        metrics={f"test/{name}": value for name, value in metrics.items()},
        curves=curves,
        classes=len(splits.test.classes),
        operating_points=tuple(asdict(point) for point in points),
        transfers=tuple(each.as_dict() for each in held),
        worst=() if curves is None else _worst(curves, splits.test.classes, config.evaluate.utility_c),
        sizes={name: (len(part.classes), len(part)) for name, part in parts.items()},
        fingerprint=splits.fingerprint,
        toy=splits.toy,
        distances=DistanceHistograms.of(pair_distances(known_embeddings, known)).as_dict() if points else None,
    )


def _worst(
    curves: threshold.ThresholdCurves, names: Sequence[str], c: float, count: int = 5
) -> tuple[tuple[str, float], ...]:
    utility_C = threshold.utility(curves, c).mean(axis=1)
    lowest = np.argsort(utility_C, kind="stable")[:count]
    return tuple((names[int(curves.classes_C[i])], float(utility_C[i])) for i in lowest)
