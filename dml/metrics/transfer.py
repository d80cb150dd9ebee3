"""What calibrated thresholds really do to other classes: the promise that a deployment needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from dml.gather import Group
from dml.metrics.class_rates import ClassRates, class_rates
from dml.metrics.inputs import Array, Counts, Floats
from dml.metrics.intervals import Interval
from dml.metrics.operating_points import OperatingPoint
from dml.metrics.pair_counts import PairGrid
from dml.metrics.pair_distances import Distance, accepting_similarity

Names: TypeAlias = Sequence[str] | Mapping[int, str]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the rates of single classes, reported by `transfer`."""


class NamedRates(NamedTuple):
    """One class at one threshold."""

    name: str
    """Its name, or its label where there are no names."""
    far: float | None
    """Accepted / all pairs with exactly one end in the class; None without such a pair."""
    frr: float | None
    """Rejected / all pairs of the class; None without such a pair."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """An operating point on other classes than it was calibrated on."""

    far_target: float
    """The false accept rate that the point was calibrated to."""
    threshold: float
    """Pairs at this distance or nearer are accepted."""
    distance: Distance
    """What the threshold is a distance in."""
    far: float
    """Accepted negatives / negatives, all classes together."""
    frr: float
    """Rejected positives / positives, all classes together."""
    far_interval: Interval | None
    """95% interval of the FAR over classes, see `dml.metrics.class_rates`."""
    frr_interval: Interval | None
    """95% interval of the FRR over classes."""
    negatives: int
    """Pairs of two classes."""
    positives: int
    """Pairs of one class."""
    labels_C: Counts
    """Labels of the classes, ascending; of the queries' classes, where there is a gallery."""
    far_C: Floats
    """FAR of every class: accepted / all pairs with exactly one end in it; NaN without such a pair."""
    frr_C: Floats
    """FRR of every class: rejected / all of its pairs; NaN without such a pair."""
    far_quantiles: dict[float, float]
    """Quantile (QUANTILES) -> FAR that this share of the classes keeps to."""
    frr_quantiles: dict[float, float]
    """Quantile (QUANTILES) -> FRR that this share of the classes with positives keeps to."""
    worst_far: tuple[NamedRates, ...]
    """The classes of the highest FAR, worst first; of equals, the smaller label first."""
    worst_frr: tuple[NamedRates, ...]
    """The classes of the highest FRR, worst first; of equals, the smaller label first."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: everything but the arrays over classes; intervals as lists, worst classes as dicts."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if not field.name.endswith("_C")}
        for kind in ("far", "frr"):
            interval = plain[f"{kind}_interval"]
            plain[f"{kind}_interval"] = None if interval is None else list(interval)
            plain[f"{kind}_quantiles"] = {f"{share:g}": rate for share, rate in plain[f"{kind}_quantiles"].items()}
            plain[f"worst_{kind}"] = [worst._asdict() for worst in plain[f"worst_{kind}"]]
        return plain


def transfer(
    operating_points: Sequence[OperatingPoint],
    embeddings_ND: Array,
    labels_N: Array,
    *,
    gallery: tuple[Array, Array] | None = None,
    names: Names | None = None,
    worst: int = 5,
    group: Group | None = None,
) -> tuple[Transfer, ...]:
    """Count, exactly, the false accepts and false rejects of calibrated thresholds on other classes.

    Args:
        operating_points: of `dml.metrics.operating_points.calibrate`; each says which distance it is in.
        embeddings_ND: (N, D) floats, NumPy or torch; rows are normalised. The queries, where there is a gallery.
        labels_N: (N,) integers.
        gallery: embeddings (G, D) and labels (G,) that the rows are compared with, instead of one another.
        names: name of each label: a sequence that labels index, or a mapping; None names classes by their labels.
        worst: how many of the worst classes to name; fewer if there are fewer.
        group: ranks that share the work, each called with the same arrays; every rank gets the whole result.

    Returns:
        One result an operating point, in their order.

    Raises:
        ValueError: bad input (see `dml.metrics.inputs`), a label without a name, or a negative `worst`.
    """
    if worst < 0:
        raise ValueError(f"worst must be 0 or more classes, got {worst}")
    edges = [accepting_similarity(point.threshold, point.distance) for point in operating_points]
    grid = PairGrid.of(embeddings_ND, labels_N, gallery)
    names_C = _names(grid.labels_C, names)
    found = class_rates(grid, edges, group)
    return tuple(
        _transfer(point, rates, grid, names_C, worst) for point, rates in zip(operating_points, found, strict=True)
    )


def _transfer(point: OperatingPoint, rates: ClassRates, grid: PairGrid, names_C: list[str], worst: int) -> Transfer:
    far_C, frr_C = rates.far_C, rates.frr_C
    return Transfer(
        far_target=point.far_target,
        threshold=point.threshold,
        distance=point.distance,
        far=rates.far,
        frr=rates.frr,
        far_interval=rates.far_interval,
        frr_interval=rates.frr_interval,
        negatives=grid.negatives,
        positives=grid.positives,
        labels_C=rates.labels_C,
        far_C=far_C,
        frr_C=frr_C,
        far_quantiles=_quantiles(far_C),
        frr_quantiles=_quantiles(frr_C),
        worst_far=tuple(NamedRates(names_C[i], _known(far_C[i]), _known(frr_C[i])) for i in _highest(far_C, worst)),
        worst_frr=tuple(NamedRates(names_C[i], _known(far_C[i]), _known(frr_C[i])) for i in _highest(frr_C, worst)),
    )


def _quantiles(rates_C: Floats) -> dict[float, float]:
    return dict(zip(QUANTILES, np.nanquantile(rates_C, QUANTILES).tolist(), strict=True))


def _highest(rates_C: Floats, count: int) -> list[int]:
    order_C = np.argsort(-rates_C, kind="stable")  # NaN comes last
    return [int(i) for i in order_C[:count] if not np.isnan(rates_C[i])]


def _known(rate: float) -> float | None:
    return None if np.isnan(rate) else float(rate)


def _names(labels_C: Counts, names: Names | None) -> list[str]:
    labels = labels_C.tolist()
    if names is None:
        return [str(label) for label in labels]
    known = names if isinstance(names, Mapping) else dict(enumerate(names))
    missing = [label for label in labels if label not in known]
    if missing:
        raise ValueError(f"label {missing[0]} has no name ({len(missing)} of {len(labels)} labels; {len(known)} names)")
    return [str(known[label]) for label in labels]
