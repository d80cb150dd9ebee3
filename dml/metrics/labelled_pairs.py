"""Operating points and rates from pairs that people labelled: a CSV file `a,b,same`, no classes needed.

    pairs = read_pairs("pairs.csv")
    labelled_pair_distances(pairs, names, embeddings)               ROC, equal error rate
    calibrate_labelled(pairs, names, embeddings, far=[1e-2])        a threshold for a target
    transfer_labelled(points, pairs, names, embeddings)             what earlier thresholds do to these pairs

Nothing is trained. Intervals need what pairs share. The labels tell of which classes the items are only in part: items
that a chain of pairs labelled as the same connects are taken as one class, and every other item as a class of its own.
In simulations the intervals covered the truth in 94 to 98% of draws where chains connect the items of a class. Where
hardly a label does, and many pairs are of few classes, they are too narrow: 79 to 90% with 2,000 negatives of 60
classes of 4 items. So label positives among the items that negatives are drawn from.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from dml.metrics.inputs import Array, Counts, Floats, normalised
from dml.metrics.intervals import Interval, rate_interval
from dml.metrics.operating_points import OperatingPoint, check_targets, operating_point
from dml.metrics.pair_counts import cell_edge, cell_of
from dml.metrics.pair_distances import Distance, PairDistances, accepting_similarity, check_distance, to_distance

Flags: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

COLUMNS = ("a", "b", "same")
SAME = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
"""What the column `same` may hold, in any case."""
CHUNK = 65536
"""Pairs whose rows are looked up at a time."""


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs of named items, and whether the two are of one class."""

    a: tuple[str, ...]
    """Names of the first items."""
    b: tuple[str, ...]
    """Names of the second items, another than the first in each pair."""
    same: tuple[bool, ...]
    """Whether the pair is a positive."""
    rows: tuple[int, ...] = ()
    """The line of each pair in its file, for messages; empty for pairs that come from no file."""

    def __len__(self) -> int:
        return len(self.same)


@dataclass(frozen=True)
class LabelledRates:
    """What a threshold does to labelled pairs."""

    far_target: float
    """The false accept rate that the threshold was calibrated to."""
    threshold: float
    """Pairs at this distance or nearer are accepted."""
    distance: Distance
    """What the threshold is a distance in."""
    far: float
    """Accepted negatives / negatives."""
    frr: float
    """Rejected positives / positives."""
    far_interval: Interval | None
    """95% interval of the FAR over classes, as far as labels tell them; None where they are too few."""
    frr_interval: Interval | None
    """95% interval of the FRR over classes, as far as labels tell them; None where they are too few."""
    negatives: int
    """Pairs labelled as not the same."""
    positives: int
    """Pairs labelled as the same."""


def read_pairs(path: str | Path) -> LabelledPairs:
    """Read pairs from a CSV file in UTF-8 whose header names the columns a, b and same; others are passed over.

    A pair that is given twice with the same label, in either order, is taken once.

    Args:
        path: the file. `same` is 1, true or yes, or 0, false or no, in any case.

    Raises:
        ValueError: a missing column, no pairs, a row with too few or too many fields or an empty name, a value of
            `same` that is none of these, a pair of an item with itself, or a pair that an earlier row contradicts; with
            the row, as an editor counts lines.
        OSError: the file cannot be read.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            return _read(reader, str(path))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file in UTF-8 after row {reader.line_num} ({error})") from error


def _read(reader: "csv.DictReader[str]", path: str) -> LabelledPairs:
    header = list(reader.fieldnames or ())
    wrong = [column for column in COLUMNS if header.count(column) != 1]
    if wrong:
        raise ValueError(
            f"{path}: needs a header with the columns a,b,same, each once, got {','.join(header) or 'an empty file'}"
        )
    seen: dict[tuple[str, str], tuple[bool, int]] = {}
    for fields in reader:
        row, where = reader.line_num, f"{path}, row {reader.line_num}"
        a, b, same = _checked(fields, where)
        before, line = seen.setdefault((min(a, b), max(a, b)), (same, row))
        if before != same:
            raise ValueError(f"{where}: {a!r} and {b!r} are labelled {int(same)} here and {int(before)} in row {line}")
    if not seen:
        raise ValueError(f"{path}: holds no pairs beneath its header")
    a_P, b_P = zip(*seen, strict=True)
    same_P, rows_P = zip(*seen.values(), strict=True)
    return LabelledPairs(a_P, b_P, same_P, rows_P)


def _checked(fields: dict[str, str], where: str) -> tuple[str, str, bool]:
    if None in fields or None in fields.values():
        raise ValueError(f"{where}: has more or fewer fields than the header")
    a, b, same = (fields[column].strip() for column in COLUMNS)
    for column, name in (("a", a), ("b", b)):
        if not name:
            raise ValueError(f"{where}: {column} is empty")
    if a == b:
        raise ValueError(f"{where}: {a!r} is paired with itself")
    if same.lower() not in SAME:
        raise ValueError(f"{where}: same is {same!r}; valid: {', '.join(SAME)}")
    return a, b, SAME[same.lower()]


def labelled_pair_distances(
    pairs: LabelledPairs, names: Sequence[str], embeddings_ND: Array, *, distance: Distance = "euclidean"
) -> PairDistances:
    """Count labelled pairs by distance, on the same cells as `dml.metrics.pair_distances.pair_distances`.

    Args:
        pairs: of `read_pairs`.
        names: (N,) names of the embeddings, each once.
        embeddings_ND: (N, D) floats, NumPy or torch; rows are normalised.
        distance: "euclidean", sqrt(2 - 2 s) in [0, 2], or "cosine", 1 - s in [0, 2].

    Raises:
        ValueError: bad embeddings (see `dml.metrics.inputs`), names of another length or given twice, a pair with an
            unknown name, or pairs of one kind only.
    """
    check_distance(distance)
    return _distances(_Measured.of(pairs, names, embeddings_ND), distance)


def calibrate_labelled(
    pairs: LabelledPairs,
    names: Sequence[str],
    embeddings_ND: Array,
    *,
    far: Sequence[float] = (1e-1, 1e-2, 1e-3),
    distance: Distance = "euclidean",
) -> tuple[OperatingPoint, ...]:
    """Find, for each FAR target, the largest distance threshold that keeps to it on labelled pairs.

    As `dml.metrics.operating_points.calibrate`, with 95% intervals over classes as far as labels tell them.

    Args:
        pairs: of `read_pairs`.
        names: (N,) names of the embeddings, each once.
        embeddings_ND: (N, D) floats, NumPy or torch; rows are normalised.
        far: targets, each between 0 and 1.
        distance: "euclidean" or "cosine".

    Raises:
        ValueError: as `labelled_pair_distances`, or a target that is no rate.
        UnreachableFARError: a target that these negatives do not resolve.
    """
    check_distance(distance)
    check_targets(far)
    measured = _Measured.of(pairs, names, embeddings_ND)
    by_distance = _distances(measured, distance)
    points = [operating_point(by_distance, target) for target in far]
    found = [measured.rates(point) for point in points]
    return tuple(
        replace(point, far_interval=rates.far_interval, frr_interval=rates.frr_interval)
        for point, rates in zip(points, found, strict=True)
    )


def transfer_labelled(
    operating_points: Iterable[OperatingPoint], pairs: LabelledPairs, names: Sequence[str], embeddings_ND: Array
) -> tuple[LabelledRates, ...]:
    """Count the false accepts and false rejects of calibrated thresholds on labelled pairs.

    Args:
        operating_points: of `calibrate` or `calibrate_labelled`; each says which distance it is in.
        pairs: of `read_pairs`.
        names: (N,) names of the embeddings, each once.
        embeddings_ND: (N, D) floats, NumPy or torch; rows are normalised.

    Returns:
        One result an operating point, in their order.

    Raises:
        ValueError: as `labelled_pair_distances`.
    """
    measured = _Measured.of(pairs, names, embeddings_ND)
    return tuple(measured.rates(point) for point in operating_points)


@dataclass(frozen=True, eq=False)
class _Measured:
    """P pairs, each with the classes of its ends, as far as labels tell, and its cosine similarity."""

    class_2P: Counts
    same_P: Flags
    similarity_P: Floats

    @classmethod
    def of(cls, pairs: LabelledPairs, names: Sequence[str], embeddings_ND: Array) -> "_Measured":
        rows_ND = _unit(embeddings_ND)
        index = {name: i for i, name in enumerate(names)}
        if len(names) != len(rows_ND):
            raise ValueError(f"needs one name for each embedding, got {len(names)} names and {len(rows_ND)} embeddings")
        if len(index) != len(names):
            twice = next(name for i, name in enumerate(names) if index[name] != i)
            raise ValueError(f"the name {twice!r} is given to several embeddings")
        items_2P = _indices(pairs, index)
        same_P = np.array(pairs.same, dtype=bool)
        for kind, count in (("the same", same_P.sum()), ("not the same", (~same_P).sum())):
            if not count:
                raise ValueError(f"rates need pairs of both kinds: none of {len(same_P)} is labelled as {kind}")
        a_P, b_P = torch.from_numpy(items_2P).to(rows_ND.device)
        # In float64, so that the order of summation, which differs from a matrix product's, moves no pair.
        parts = [
            (rows_ND[a].double() * rows_ND[b].double()).sum(dim=1)
            for a, b in zip(a_P.split(CHUNK), b_P.split(CHUNK), strict=True)
        ]
        return cls(_connected(items_2P[:, same_P], len(rows_ND))[items_2P], same_P, torch.cat(parts).cpu().numpy())

    def rates(self, point: OperatingPoint) -> LabelledRates:
        accepted_P = self.similarity_P >= accepting_similarity(point.threshold, point.distance)
        accepted_A, rejected_R = accepted_P[~self.same_P], ~accepted_P[self.same_P]
        return LabelledRates(
            far_target=point.far_target,
            threshold=point.threshold,
            distance=point.distance,
            far=int(accepted_A.sum()) / len(accepted_A),
            frr=int(rejected_R.sum()) / len(rejected_R),
            far_interval=_negatives_interval(accepted_A, self.class_2P[:, ~self.same_P]),
            frr_interval=_positives_interval(rejected_R, self.class_2P[0, self.same_P]),
            negatives=len(accepted_A),
            positives=len(rejected_R),
        )


def _negatives_interval(hit_P: Flags, class_2P: Counts) -> Interval | None:
    low_P, high_P = np.sort(class_2P, axis=0)
    dyads, dyad_P = np.unique(low_P * (high_P.max() + 1) + high_P, return_inverse=True)
    totals_D, hits_D = np.bincount(dyad_P), np.bincount(dyad_P[hit_P], minlength=len(dyads))
    totals_C = np.bincount(class_2P.ravel())
    hits_C = np.bincount(class_2P[:, hit_P].ravel(), minlength=len(totals_C))
    squares = float(((hits_D - hit_P.mean() * totals_D) ** 2).sum())
    return rate_interval(hits_C, totals_C, ends=2, squares=squares, trials=len(dyads))


def _positives_interval(hit_P: Flags, class_P: Counts) -> Interval | None:
    totals_C = np.bincount(class_P)
    return rate_interval(np.bincount(class_P[hit_P], minlength=len(totals_C)), totals_C)


def _connected(edges_2P: Counts, items: int) -> Counts:
    """The component that each item lies in, in the graph of these edges."""
    from scipy.sparse import coo_array  # type: ignore[import-untyped]
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

    graph = coo_array((np.ones(edges_2P.shape[1]), (edges_2P[0], edges_2P[1])), shape=(items, items))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _unit(embeddings_ND: Array) -> torch.Tensor:
    rows_ND = torch.as_tensor(embeddings_ND).detach()
    if rows_ND.ndim != 2 or not rows_ND.is_floating_point():
        raise ValueError(f"needs embeddings (N, D) of floats, got {tuple(rows_ND.shape)} of {rows_ND.dtype}")
    return normalised(rows_ND, "embeddings")


def _indices(pairs: LabelledPairs, index: dict[str, int]) -> Counts:
    for pair, ends in enumerate(zip(pairs.a, pairs.b, strict=True)):
        for column, name in zip("ab", ends, strict=True):
            if name not in index:
                where = f"row {pairs.rows[pair]}" if pairs.rows else f"pair {pair}, counted from 0"
                raise ValueError(f"{where}: {column} is {name!r}, which names no embedding ({len(index)} names)")
    return np.array([[index[name] for name in names_P] for names_P in (pairs.a, pairs.b)], dtype=np.int64)


def _distances(measured: _Measured, distance: Distance) -> PairDistances:
    cells_P = np.array([cell_of(similarity) for similarity in measured.similarity_P.tolist()])
    cells_M, which_P = np.unique(-cells_P, return_inverse=True)
    edges_M = np.array([cell_edge(-int(cell)) for cell in cells_M], dtype=np.float64)
    positives_M, negatives_M = (
        np.bincount(which_P[of_P], minlength=len(cells_M)) for of_P in (measured.same_P, ~measured.same_P)
    )
    return PairDistances(to_distance(edges_M, distance), positives_M, negatives_M, distance)
