"""Random numbers that are a pure function of what they are for.

A draw depends on its key, row and column only: never on the batch it is in, the rank, the thread or what was drawn
before. That is what makes two ranks equal one and a resumed run equal an uninterrupted one.
"""

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment; odd, so its multiples visit all 64-bit states
_COLUMN = 0xD1342543DE82EF95  # another odd multiplier, so that rows and columns do not walk the same sequence


def uniform(*key: int, rows: npt.ArrayLike, count: int) -> npt.NDArray[np.float64]:
    """Uniform draws in [0, 1), (N, count) float64, one row for each integer in rows (N,).

    The splitmix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)
    applied as a counter-based hash of (key..., row, column). Integers may be negative; they count modulo 2^64.
    """
    state = 0
    for part in key:
        state = _mix_int(((state + _GOLDEN) & _MASK) ^ _mix_int(((part & _MASK) + _GOLDEN) & _MASK))
    rows_N1 = np.asarray(rows, dtype=np.int64).reshape(-1, 1).astype(np.uint64)
    columns_1C = np.arange(1, count + 1, dtype=np.uint64).reshape(1, -1)
    rows_N1 = _mix((rows_N1 + np.uint64(1)) * np.uint64(_GOLDEN) ^ np.uint64(state))
    bits_NC = _mix(rows_N1 + columns_1C * np.uint64(_COLUMN))
    return (bits_NC >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(*key: int, n: int) -> npt.NDArray[np.int64]:
    """A permutation of 0..n-1, (n,) int64, that depends on the key alone."""
    return np.argsort(uniform(*key, rows=np.arange(n), count=1)[:, 0], kind="stable").astype(np.int64)


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _mix_int(bits: int) -> int:
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)
