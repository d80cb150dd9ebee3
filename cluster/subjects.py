"""What is evaluated: embeddings of a dataset by a model, or a file of them, and the thresholds to put to the test."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cluster import registry
from dml import checkpoint, evaluate, gather, report
from dml.config import Config, DataConfig, EvaluateConfig
from dml.data import arrays, datasets, folders
from dml.data.imageset import ImageSet
from dml.metrics import labelled_pairs
from dml.metrics.operating_points import OperatingPoint
from dml.names import unknown

Done = Callable[[int, int], None]
"""Called after each batch of a rank with the images embedded so far and the images in all."""


@dataclass(frozen=True)
class Source:
    """Where embeddings and thresholds come from; plain strings, so that it travels to the workers.

    Raises:
        ValueError: sources that do not go together.
    """

    model: str = ""
    """A checkpoint folder, models:/NAME@ALIAS or models:/NAME/VERSION."""
    data: str = ""
    """Dataset to embed; the model's own when empty."""
    root: str = ""
    """image_folder only: the folder that holds one folder of images a class."""
    split: str = "auto"
    """train, val, test or all; auto is test for the model's own data, all for any other."""
    embeddings: str = ""
    """A .npz file instead of a model."""
    calibration: str = ""
    """A .npz file that thresholds are set on."""
    pairs: str = ""
    """A CSV file of labelled pairs."""
    distance: str = "model"
    """euclidean, cosine, or that of the model."""
    far: tuple[float, ...] = evaluate.FAR_TARGETS
    """Targets of the thresholds that are set on --calibration or on val."""

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.embeddings):
            raise ValueError("give one of --model (a checkpoint folder or models:/...) and --embeddings (a .npz file)")
        if self.embeddings and (self.data or self.root or self.split != "auto"):
            raise ValueError("--data, --root and --split go with --model: a file of embeddings is what it is")
        if self.model and self.calibration:
            raise ValueError("--calibration goes with --embeddings; a model brings thresholds of its own")
        if self.pairs and (self.data or self.root or self.split != "auto"):
            raise ValueError("--pairs names its images itself: --data, --root and --split do not go with it")
        for target in self.far:
            if not 0 < target < 1:
                raise ValueError(f"far: {target:g} is no false accept rate; it must lie between 0 and 1")


@dataclass(frozen=True, eq=False)
class Loaded:
    """What there is to measure, on every rank."""

    title: str
    """For a person: onethreshold@1 on glyphs test."""
    prefix: str
    """Of the metrics' names: test/."""
    config: EvaluateConfig
    points: tuple[OperatingPoint, ...]
    """Thresholds from elsewhere, largest FAR first."""
    points_from: str
    """Where these were calibrated."""
    subject: report.Subject | None = None
    pairs: report.LabelledSubject | None = None


def load(source: Source, *, device: torch.device, group: gather.Group | None, done: Done) -> Loaded:
    """Reads and embeds what a source names; under a group ranks share the embedding and each gets all rows.

    Raises:
        ValueError: a model, a file or a dataset that is not what it should be; the message names it.
        FileNotFoundError: a path that leads nowhere.
    """
    if source.embeddings:
        return _from_file(source, group)
    folder, name = registry.fetch(source.model)
    model = checkpoint.load(folder)
    work = _Embedding(model.encoder.to(device), model.config, device, group, done)
    config = _judged(source, model.config.evaluate)
    stored = _stored_points(folder, config.distance)
    if source.pairs:
        labelled = labelled_pairs.read_pairs(source.pairs)
        names = sorted({*labelled.a, *labelled.b})
        images = folders.listed(names, Path(source.pairs).parent, model.config.data)
        pairs = report.LabelledSubject(labelled, tuple(names), work(images))
        points, where = (stored, "val classes") if stored else ((), "")
        return Loaded(f"{name} on {Path(source.pairs).name}", "pairs/", config, points, where, pairs=pairs)
    return _from_dataset(source, work, name, config, stored)


def _from_file(source: Source, group: gather.Group | None) -> Loaded:
    config = _judged(source, EvaluateConfig())
    file = arrays.read(source.embeddings)
    points: tuple[OperatingPoint, ...] = ()
    where = ""
    if source.calibration:
        known = arrays.read(source.calibration)
        if known.labels_N is None:
            raise ValueError(f"{source.calibration}: no array 'labels'; thresholds are set on labelled rows")
        points = evaluate.calibrate(
            known.embeddings_ND, known.labels_N, config, source.far, gallery=known.gallery, group=group
        )
        where = Path(source.calibration).name
    title = Path(source.embeddings).name
    if source.pairs:
        if file.names is None:
            raise ValueError(f"{source.embeddings}: no array 'names'; the pairs of {source.pairs} name rows by it")
        pairs = report.LabelledSubject(labelled_pairs.read_pairs(source.pairs), file.names, file.embeddings_ND)
        title = f"{title} on {Path(source.pairs).name}"
        return Loaded(title, "pairs/", config, points, where, pairs=pairs)
    if file.labels_N is None:
        raise ValueError(f"{source.embeddings}: no array 'labels'; without labels, give --pairs")
    subject = report.Subject(file.embeddings_ND, file.labels_N, file.classes, file.gallery)
    return Loaded(title, "", config, points, where, subject)


@dataclass(frozen=True, eq=False)
class _Embedding:
    """Embeds image sets with one encoder."""

    encoder: torch.nn.Module
    config: Config
    device: torch.device
    group: gather.Group | None
    done: Done

    def __call__(self, images: ImageSet) -> torch.Tensor:
        share = -(-len(images) // gather.world(self.group))
        seen = 0

        def done(batch: int) -> None:
            nonlocal seen
            seen += batch
            self.done(seen, share)

        return evaluate.embed(self.encoder, images, self.config, device=self.device, group=self.group, done=done)


def _from_dataset(
    source: Source, work: _Embedding, name: str, config: EvaluateConfig, stored: tuple[OperatingPoint, ...]
) -> Loaded:
    trained = work.config.data
    data = _data(source, trained)
    own = data == trained
    split = ("test" if own else "all") if source.split == "auto" else source.split
    splits = datasets.load(data) if split != "all" else None
    images = datasets.whole(data) if splits is None else getattr(splits, split)
    if not len(images):
        raise ValueError(f"the {split} split of {data.dataset} is empty")
    points, where = stored, "val classes"
    if not points and own and split == "test" and splits is not None:
        points = evaluate.calibrate(
            work(splits.val), torch.from_numpy(splits.val.labels_N), config, source.far, group=work.group
        )
    subject = report.Subject(
        work(images), torch.from_numpy(images.labels_N), images.classes, images=lambda rows: _pictures(images, rows)
    )
    where = where if points else ""
    return Loaded(f"{name} on {data.dataset} {split}", f"{split}/", config, points, where, subject)


def _data(source: Source, trained: DataConfig) -> DataConfig:
    """The model's own data settings, or those of another dataset seen through the model's transform."""
    if source.data and source.data not in datasets.DATASETS:
        raise ValueError(unknown("dataset", source.data, datasets.DATASETS))
    if source.data in ("", trained.dataset) and source.root in ("", trained.root):
        return trained
    dataset = source.data or "image_folder"
    if dataset == "image_folder" and not (source.root or trained.root):
        raise ValueError("--data image_folder needs --root, the folder that holds one folder of images a class")
    changes = {"dataset": dataset, "root": source.root or None, "split_csv": None}
    return trained.model_copy(update=changes)


def _judged(source: Source, config: EvaluateConfig) -> EvaluateConfig:
    return config if source.distance == "model" else config.model_copy(update={"distance": source.distance})


def _stored_points(folder: Path, distance: str) -> tuple[OperatingPoint, ...]:
    """The thresholds that a registered model carries; none if they are of the other distance."""
    file = folder / registry.OPERATING_POINTS
    if not file.is_file():
        return ()
    known = {field.name for field in fields(OperatingPoint)}
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    points = [OperatingPoint(**{key: value for key, value in row.items() if key in known}) for row in rows]
    return tuple(point for point in points if point.distance == distance)


def _pictures(images: ImageSet, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
    """uint8 (H, W) or (H, W, 3) of these rows."""
    pictures = []
    for image in images.images(rows):
        array = image.permute(1, 2, 0).numpy()
        pictures.append(array[:, :, 0] if array.shape[2] == 1 else array)
    return pictures
