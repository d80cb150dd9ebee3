"""What thresholds do to each class, and to all classes together, with intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dml.gather import Group
from dml.metrics.inputs import Counts, Floats, full_precision
from dml.metrics.intervals import Interval, rate_interval, squared_residuals
from dml.metrics.pair_counts import PairGrid, count_accepted
from dml.metrics.pair_grid import Position, similarity_tiles, sum_over

TABLE = 512
"""Classes up to which accepted pairs are counted for every pair of classes; beyond, for every class."""


@dataclass(frozen=True, eq=False)
class ClassRates:
    """Accepted negatives and rejected positives of every class at one threshold."""

    labels_C: Counts
    """Labels of the classes, ascending; of the queries' classes, where there is a gallery."""
    accepted_C: Counts
    """Accepted pairs with exactly one end in the class."""
    negatives_C: Counts
    """All pairs with exactly one end in the class."""
    rejected_C: Counts
    """Rejected pairs of the class."""
    positives_C: Counts
    """All pairs of the class."""
    ends: int
    """Classes that a negative is counted in: 2, or 1 where there is a gallery."""
    squares: float
    """See `dml.metrics.intervals.rate_interval`; 0 where it is not known."""

    @property
    def far(self) -> float:
        """Accepted negatives / negatives of all classes together."""
        return int(self.accepted_C.sum()) / int(self.negatives_C.sum())

    @property
    def frr(self) -> float:
        """Rejected positives / positives of all classes together."""
        return int(self.rejected_C.sum()) / int(self.positives_C.sum())

    @property
    def far_interval(self) -> Interval | None:
        """95% interval of the FAR over classes.

        Of one set with itself, both classes of a negative are drawn from the population. In query/gallery form only
        the queries' classes are: the gallery is what is deployed, and the interval is that of other queries to it.
        """
        classes = int((self.negatives_C > 0).sum())
        trials = classes * (classes - 1) // 2 if self.ends == 2 else classes
        return rate_interval(self.accepted_C, self.negatives_C, ends=self.ends, squares=self.squares, trials=trials)

    @property
    def frr_interval(self) -> Interval | None:
        """95% interval of the FRR over classes, the queries' classes where there is a gallery."""
        return rate_interval(self.rejected_C, self.positives_C)

    @property
    def far_C(self) -> Floats:  # noqa: N802
        """FAR of every class; NaN for one without negatives."""
        return _share(self.accepted_C, self.negatives_C)

    @property
    def frr_C(self) -> Floats:  # noqa: N802
        """FRR of every class; NaN for one without positives."""
        return _share(self.rejected_C, self.positives_C)


def _share(part_C: Counts, whole_C: Counts) -> Floats:
    return np.asarray(np.divide(part_C, whole_C, out=np.full(len(whole_C), np.nan), where=whole_C > 0))


def class_rates(grid: PairGrid, similarities_T: Sequence[float], group: Group | None = None) -> tuple[ClassRates, ...]:
    """Count what each threshold accepts, exactly, over all pairs of a grid.

    Args:
        grid: all pairs; the same on every rank.
        similarities_T: thresholds: pairs with at least this cosine similarity are accepted; in any order.
        group: ranks that share the tiles; each gets all counts.

    Returns:
        One result a threshold, in their order.
    """
    if not len(similarities_T):
        return ()
    descending_T, place_T = np.unique(-np.asarray(similarities_T, dtype=np.float64), return_inverse=True)
    edges_T = -descending_T
    with full_precision(grid.device):
        if grid.one_set and len(grid.labels_C) <= TABLE:
            found = [_from_table(grid, table_CC) for table_CC in accepted_tables(grid, edges_T, group)]
        else:
            positives_CT, negatives_CT = count_accepted(grid, edges_T, group)
            found = [
                _rates(grid, positives_C, negatives_C, 0.0)
                for positives_C, negatives_C in zip(positives_CT.T, negatives_CT.T, strict=True)
            ]
    return tuple(found[place] for place in place_T)


def _from_table(grid: PairGrid, table_CC: Counts) -> ClassRates:
    positives_C = table_CC.diagonal()
    negatives_C = table_CC.sum(axis=0) + table_CC.sum(axis=1) - 2 * positives_C
    return _rates(grid, positives_C, negatives_C, squared_residuals(table_CC, _sizes(grid)))


def _sizes(grid: PairGrid) -> Counts:
    own_N = grid.rows.class_M[: grid.rows.n]
    return np.asarray(torch.bincount(own_N, minlength=len(grid.labels_C)).cpu().numpy())


def _rates(grid: PairGrid, positives_C: Counts, negatives_C: Counts, squares: float) -> ClassRates:
    rejected_C, ends = grid.positives_C - positives_C, 2 if grid.one_set else 1
    return ClassRates(grid.labels_C, negatives_C, grid.negatives_C, rejected_C, grid.positives_C, ends, squares)


def accepted_tables(grid: PairGrid, edges_T: Floats, group: Group | None = None) -> Counts:
    """Accepted pairs of one set with itself, between all its classes.

    Args:
        grid: all pairs of one set; the same on every rank.
        edges_T: similarities; pairs at or above are accepted.
        group: ranks that share the tiles; each gets all counts.

    Returns:
        (T, C, C) int64: positives on the diagonal, negatives above it, zeros below.
    """
    edges = torch.from_numpy(edges_T).to(grid.rows.rows_MD).tolist()

    def work(positions: Iterator[Position]) -> torch.Tensor:
        classes = len(grid.labels_C)
        tables = grid.rows.class_M.new_zeros(len(edges), classes, classes)
        for tile in similarity_tiles(grid, positions):
            row_class, column_class = tile.classes(grid)
            own_RM = _one_hot(row_class, tile.row_classes, tile.similarity)
            own_CM = _one_hot(column_class, tile.column_classes, tile.similarity)
            inside = (slice(None), *(slice(x[0], x[-1] + 1) for x in (tile.row_classes, tile.column_classes)))
            accepted = [own_RM @ (tile.similarity >= edge).to(own_RM) @ own_CM.T for edge in edges]
            tables[inside] += torch.stack(accepted).to(torch.int64)
        return tables

    return sum_over(grid.tiles, work, grid.device, group)


def _one_hot(class_of: torch.Tensor, classes: range, like: torch.Tensor) -> torch.Tensor:
    return (torch.arange(classes[0], classes[-1] + 1, device=like.device)[:, None] == class_of).to(like)
