import numpy as np
import pytest

from dml import draws

MASK = (1 << 64) - 1


def splitmix(state: int) -> int:
    """The splitmix64 finaliser in plain Python integers, as published."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def oracle(key: tuple[int, ...], row: int, column: int) -> float:
    golden = 0x9E3779B97F4A7C15
    state = 0
    for part in key:
        state = splitmix(((state + golden) & MASK) ^ splitmix(((part & MASK) + golden) & MASK))
    row_bits = splitmix((((row & MASK) + 1) * golden & MASK) ^ state)
    return (splitmix((row_bits + (column + 1) * 0xD1342543DE82EF95) & MASK) >> 11) / 2**53


@pytest.mark.parametrize("key", [(), (0,), (1, 2, 3), (-1, 2**70, 5)])
def test_draws_equal_the_slow_oracle(key: tuple[int, ...]) -> None:
    rows = [0, 1, 5, 10**12, -3]
    expected = [[oracle(key, row, column) for column in range(4)] for row in rows]
    np.testing.assert_array_equal(draws.uniform(*key, rows=rows, count=4), expected)


def test_a_draw_does_not_depend_on_the_batch_it_is_in() -> None:
    whole = draws.uniform(7, 3, rows=np.arange(100), count=5)
    np.testing.assert_array_equal(draws.uniform(7, 3, rows=[42, 7], count=5), whole[[42, 7]])
    np.testing.assert_array_equal(draws.uniform(7, 3, rows=np.arange(100), count=2), whole[:, :2])


def test_keys_rows_and_columns_all_count() -> None:
    rows = np.arange(1000)
    tables = [draws.uniform(*key, rows=rows, count=3) for key in [(0, 0), (0, 1), (1, 0), (0,), (0, 0, 0)]]
    values = np.concatenate([table.ravel() for table in tables])
    assert len(np.unique(values)) == len(values), "no two of 15,000 draws of 53 bits are the same"


def test_draws_are_uniform_and_uncorrelated() -> None:
    table = draws.uniform(11, rows=np.arange(20_000), count=3)
    assert table.min() >= 0
    assert table.max() < 1
    counts = np.histogram(table, bins=20, range=(0, 1))[0]
    chi_squared = ((counts - 3000.0) ** 2 / 3000.0).sum()
    assert chi_squared < 44, "the 99.9 % point of 19 degrees of freedom is 43.8"
    series = [*table.T, np.roll(table[:, 0], 1)]
    correlations = np.corrcoef(series) - np.eye(4)
    assert np.abs(correlations).max() < 0.03, "four standard errors of 20,000 rows"


def test_no_rows_no_draws() -> None:
    assert draws.uniform(1, rows=[], count=3).shape == (0, 3)


def test_a_permutation_holds_each_number_once_and_follows_its_key() -> None:
    one, again, other = (draws.permutation(*key, n=50) for key in [(1, 2), (1, 2), (2, 1)])
    assert sorted(one.tolist()) == list(range(50))
    np.testing.assert_array_equal(one, again)
    assert one.tolist() != other.tolist()
    assert one.tolist() != list(range(50))
