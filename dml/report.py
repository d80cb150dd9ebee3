"""Everything that is measured of embeddings whose classes were not trained on, and the figures that show it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from dml import evaluate, gather, plots, projection
from dml.config import EvaluateConfig
from dml.metrics import classification, clustering, retrieval, space, threshold
from dml.metrics.inputs import Floats, unit_rows
from dml.metrics.labelled_pairs import (
    LabelledPairs,
    LabelledRates,
    calibrate_labelled,
    labelled_pair_distances,
    transfer_labelled,
)
from dml.metrics.neighbours import nearest
from dml.metrics.operating_points import OperatingPoint, operating_point
from dml.metrics.pair_distances import PairDistances, pair_distances
from dml.metrics.transfer import Transfer, transfer
from dml.names import unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part: TypeAlias = Literal["retrieval", "consistency", "pairs", "clustering", "space", "classification"]
PARTS: tuple[Part, ...] = get_args(Part)
Images: TypeAlias = Callable[[npt.NDArray[np.int64]], Sequence[npt.NDArray[np.uint8]]]

NEIGHBOURS = 8
"""Nearest neighbours of each query on the contact sheet."""
QUERIES = 8
"""Rows of the contact sheet."""
SHOTS = (1, 5)
"""Labelled samples of each class that a classification learns from."""


@dataclass(frozen=True, eq=False)
class Subject:
    """Embeddings to be judged.

    Raises:
        ValueError: as many names as there are classes are needed.
    """

    embeddings_ND: torch.Tensor
    """(N, D) floats."""
    labels_N: torch.Tensor
    """(N,) int64, 0..C-1."""
    classes: tuple[str, ...]
    """Names, by label."""
    gallery: tuple[torch.Tensor, torch.Tensor] | None = None
    """Embeddings and labels that the rows above are queries against; None compares the rows with one another."""
    images: Images | None = None
    """uint8 pictures (H, W) or (H, W, 3) of rows, by position, for the contact sheet; without a gallery only."""

    def __post_init__(self) -> None:
        most = int(max(side.max() for side in (self.labels_N, *(self.gallery or ())[1:]) if len(side)))
        if most >= len(self.classes):
            raise ValueError(f"label {most} has no name: there are {len(self.classes)} classes")


@dataclass(frozen=True, eq=False)
class LabelledSubject:
    """Embeddings of the things that labelled pairs name."""

    pairs: LabelledPairs
    names: tuple[str, ...]
    """Name of each row."""
    embeddings_ND: torch.Tensor
    """(N, D) floats."""


@dataclass(frozen=True, eq=False)
class Report:
    """What `measure` or `measure_pairs` found."""

    counts: dict[str, int]
    """How much was measured: samples and classes, or pairs."""
    metrics: dict[str, float]
    """Flat, by name: recall@1, map@r, opis, nmi, pi_ratio, knn_5shot, ..."""
    retrieved: retrieval.Retrieval | None = None
    """By query; None where it was not asked for."""
    curves: threshold.ThresholdCurves | None = None
    """None where they were not asked for, or where embeddings are collapsed."""
    pairs: PairDistances | None = None
    """None where they were not asked for."""
    operating_points: tuple[OperatingPoint, ...] = ()
    """Calibrated on these samples themselves."""
    held: tuple[Transfer, ...] = ()
    """What those do to each class."""
    transfers: tuple[Transfer, ...] = ()
    """What thresholds that were calibrated elsewhere do here."""
    rates: tuple[LabelledRates, ...] = ()
    """The same on labelled pairs."""
    singular_values_D: Floats = field(default_factory=lambda: np.empty(0))

    def as_dict(self, prefix: str = "") -> dict[str, Any]:
        """As JSON: counts, metrics under their names with the prefix, operating_points and transfer."""
        held = [each.as_dict() for each in self.held] or [{} for _ in self.operating_points]
        own = [{**each, **asdict(point)} for each, point in zip(held, self.operating_points, strict=True)]
        return {
            **self.counts,
            "metrics": {f"{prefix}{name}": _json(value) for name, value in self.metrics.items()},
            "operating_points": own,
            "transfer": [*(each.as_dict() for each in self.transfers), *map(asdict, self.rates)],
        }


def measure(
    subject: Subject,
    config: EvaluateConfig,
    *,
    points: Sequence[OperatingPoint] = (),
    far: Sequence[float] = evaluate.FAR_TARGETS,
    skip: Sequence[Part] = (),
    seed: int = 0,
    group: gather.Group | None = None,
    doing: Callable[[str], None] = lambda part: None,
) -> Report:
    """Measures embeddings in every way that this package has.

    Args:
        subject: what is judged. With a gallery: retrieval, consistency and pairs only.
        config: calibration range, utility and distance.
        points: operating points calibrated on other classes, whose promise is put to the test.
        far: targets that operating points are calibrated for on these samples; those that they resolve.
        skip: parts to leave out; clustering and classification take long where classes are many.
        seed: of k-means and of the draws of classification.
        group: ranks that share the work, each with the same subject. Clustering, space and classification are the first
            rank's alone; the other parts' figures are the same on every rank.
        doing: called with the name of each part as it begins.

    Raises:
        ValueError: bad input (see `dml.metrics.inputs`), or an unknown part.
    """
    for part in skip:
        if part not in PARTS:
            raise ValueError(unknown("part", part, PARTS))
    single = ("clustering", "space", "classification")
    alone = single if subject.gallery is not None or gather.rank(group) != 0 else ()
    rows, labels, gallery = subject.embeddings_ND, subject.labels_N, subject.gallery
    metrics: dict[str, float] = {}
    found: dict[str, Any] = {}
    for part in [part for part in PARTS if part not in (*skip, *alone)]:
        doing(part)
        if part == "retrieval":
            found["retrieved"] = retrieval.retrieval(rows, labels, gallery=gallery, group=group)
            metrics |= found["retrieved"].means()
        elif part == "consistency":
            found["curves"] = evaluate.curves(rows, labels, config, gallery=gallery, group=group)
            metrics |= evaluate.consistency(found["curves"], config.utility_c)
        elif part == "pairs":
            pairs = pair_distances(rows, labels, gallery=gallery, distance=config.distance, group=group)
            metrics |= {"auc": pairs.auc, "equal_error_rate": pairs.equal_error_rate}
            found |= {"pairs": pairs, **_thresholds(pairs, subject, points, far, group)}
        elif part == "clustering":
            metrics |= clustering.clustering(rows, labels, seed=seed)
        elif part == "space":
            metrics |= space.space(rows, labels)
            found["singular_values_D"] = space.singular_values(rows)
        elif part == "classification":
            sizes_C = torch.unique(labels, return_counts=True)[1]
            shots = [shots for shots in SHOTS if int((sizes_C > shots).sum()) >= 2]
            if shots:
                metrics |= classification.classification(rows, labels, shots=shots, seed=seed)
    counts = {"samples": len(labels), "classes": len(torch.unique(labels))}
    if gallery is not None:
        counts["gallery"] = len(gallery[1])
    return Report(counts, metrics, **found)


def _thresholds(
    pairs: PairDistances,
    subject: Subject,
    points: Sequence[OperatingPoint],
    far: Sequence[float],
    group: gather.Group | None,
) -> dict[str, tuple[Any, ...]]:
    """What `operating_points.calibrate` and `transfer` give, from pairs that are counted already and one more count."""
    own = evaluate.reachable(lambda targets: tuple(operating_point(pairs, target) for target in targets), far)
    both = transfer(
        (*points, *own),
        subject.embeddings_ND,
        subject.labels_N,
        gallery=subject.gallery,
        names=subject.classes,
        group=group,
    )
    held = both[len(points) :]
    return {
        "operating_points": tuple(
            replace(point, far_interval=each.far_interval, frr_interval=each.frr_interval)
            for point, each in zip(own, held, strict=True)
        ),
        "transfers": both[: len(points)],
        "held": held,
    }


def measure_pairs(
    subject: LabelledSubject,
    config: EvaluateConfig,
    *,
    points: Sequence[OperatingPoint] = (),
    far: Sequence[float] = evaluate.FAR_TARGETS,
) -> Report:
    """Measures embeddings on pairs that somebody has labelled.

    Args:
        subject: the pairs, and an embedding of each thing that they name.
        config: the distance.
        points: operating points calibrated elsewhere, whose promise is put to the test.
        far: targets that operating points are calibrated for on these pairs; those that they resolve.

    Raises:
        ValueError: a name without an embedding, or pairs of one kind only.
    """
    known = (subject.pairs, subject.names, subject.embeddings_ND)
    pairs = labelled_pair_distances(*known, distance=config.distance)
    own = evaluate.reachable(
        lambda targets: calibrate_labelled(*known, far=targets, distance=config.distance),
        far,
    )
    return Report(
        {"pairs": len(subject.pairs), "same": sum(subject.pairs.same)},
        {"auc": pairs.auc, "equal_error_rate": pairs.equal_error_rate},
        pairs=pairs,
        operating_points=own,
        rates=transfer_labelled(points, *known),
    )


def figures(
    report: Report,
    subject: Subject | None,
    config: EvaluateConfig,
    *,
    points: Sequence[OperatingPoint] = (),
    seed: int = 0,
) -> Iterator[tuple[str, "Figure"]]:
    """The figures of what was measured, by name, as they are drawn.

    Args:
        report: of `measure` or `measure_pairs`.
        subject: what was given to `measure`; None for labelled pairs.
        config: the utility.
        points: thresholds to mark; those calibrated on the samples themselves where there are none.
        seed: of the choice of queries and classes that are shown, and of the map.
    """
    marked = tuple(points) or report.operating_points
    if report.curves is not None:
        yield "utility", plots.utility_curves(report.curves, c=config.utility_c)
    if report.pairs is not None:
        yield "error_rates", plots.error_rates(report.pairs, marked)
        yield "distances", plots.distance_histograms(report.pairs, [point.threshold for point in marked])
    for kept in sorted(report.transfers or report.held, key=lambda each: abs(np.log(each.far_target / 0.01)))[:1]:
        yield "class_far", _class_far(kept, subject)
    if len(report.singular_values_D):
        rho = space.spectral_decay(report.singular_values_D)
        yield "spectrum", plots.spectrum(report.singular_values_D, rho)
    if subject is None:
        return
    if report.retrieved is not None and subject.images is not None:
        yield "neighbours", _contact_sheet(report.retrieved, subject, seed)
    if subject.gallery is None:
        ids, points_N2 = projection.project(subject.embeddings_ND, subject.labels_N, seed=seed)
        yield "map", plots.embedding_map(points_N2, subject.labels_N[ids], subject.classes, seed=seed)


def _class_far(kept: Transfer, subject: Subject | None) -> "Figure":
    known = ~np.isnan(kept.far_C)
    labels = kept.labels_C[known].tolist()
    names = [subject.classes[label] for label in labels] if subject is not None else None
    return plots.class_far(
        kept.far_C[known], far_target=kept.far_target, far=kept.far, threshold=kept.threshold, names=names
    )


def _contact_sheet(retrieved: retrieval.Retrieval, subject: Subject, seed: int) -> "Figure":
    asked = np.flatnonzero(retrieved.positives_Q > 0)
    queries = asked[plots.pick_queries(retrieved.values["recall@1"][asked] == 1, QUERIES, seed=seed)]
    rows_ND = unit_rows(subject.embeddings_ND, subject.labels_N)[0]
    itself = torch.from_numpy(queries)
    similarity, ids = nearest(rows_ND[itself], rows_ND, NEIGHBOURS, exclude_Q=itself)
    assert subject.images is not None
    shown = np.unique(np.concatenate([queries, ids.numpy().ravel()]))
    pictures = dict(zip(shown.tolist(), subject.images(shown), strict=True))
    distances = (2 - 2 * similarity.double()).clamp(min=0).sqrt()
    return plots.contact_sheet(pictures, subject.labels_N, queries, ids, distances, names=subject.classes)


def _json(value: float) -> float | None:
    return value if np.isfinite(value) else None
