"""What a setting is searched over, as it is written on a command line: `log(1e-5,1e-3)`, `[128,512]`.

uniform(low,high)   a number, every value alike
log(low,high)       a number above 0, every order of magnitude alike
int(low,high)       a whole number, both ends included
[a,b,c]             one of these: numbers, true, false, none or words
"""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from dml.names import unknown

if TYPE_CHECKING:
    from optuna import Trial

Value: TypeAlias = str | int | float | bool | None

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*\((.*)\)\s*")
_WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included.

    Attributes:
        kind: uniform, log or int.
        low: the least value.
        high: the largest value.
    """

    kind: str
    low: float
    high: float

    def suggest(self, trial: "Trial", name: str) -> Value:
        """Has Optuna choose the value of a parameter of this name."""
        if self.kind == "int":
            return trial.suggest_int(name, int(self.low), int(self.high))
        return trial.suggest_float(name, self.low, self.high, log=self.kind == "log")

    def holds(self, value: object) -> bool:
        """Whether a value lies in it."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and (self.kind != "int" or float(value).is_integer())

    def nearest(self, value: float) -> float:
        """The value in it that is nearest to this one."""
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.kind == "int" else inside

    def samples(self) -> tuple[Value, ...]:
        """Both ends and a value between them, which a setting must all take."""
        return (*self.grid(2), self.nearest(self.low + 0.382 * (self.high - self.low)))

    def grid(self, points: int) -> tuple[Value, ...]:
        """So many values, evenly spaced on its own scale with both ends; fewer where it has fewer."""
        shares = [0.5] if points == 1 else [index / (points - 1) for index in range(points)]
        if self.kind == "log":
            values = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            values = [self.low + (self.high - self.low) * share for share in shares]
        # Rounding may carry an end past itself, and whole numbers fall together.
        return tuple(dict.fromkeys(self.nearest(value) for value in values))

    def __str__(self) -> str:
        return f"{self.kind}({self.low:g},{self.high:g})"


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Attributes:
        values: in the order of the command line.
    """

    values: tuple[Value, ...]

    def suggest(self, trial: "Trial", name: str) -> Value:
        """Has Optuna choose the value of a parameter of this name."""
        return trial.suggest_categorical(name, self.values)

    def holds(self, value: object) -> bool:
        """Whether a value is one of them."""
        return any(value == own and isinstance(value, bool) == isinstance(own, bool) for own in self.values)

    def nearest(self, value: float) -> Value:
        """The number among them that is nearest to this one; the first value where there is no number."""
        numbers = [own for own in self.values if isinstance(own, int | float)]
        return min(numbers, key=lambda own: abs(own - value)) if numbers else self.values[0]

    def samples(self) -> tuple[Value, ...]:
        """Every value, which a setting must all take."""
        return self.values

    def grid(self, points: int) -> tuple[Value, ...]:
        """Every value, however many points were asked for."""
        return self.values

    def __str__(self) -> str:
        return f"[{','.join('none' if value is None else str(value) for value in self.values)}]"


def parse(text: str) -> tuple[str, Range | Choice]:
    """Reads one word of --space, `name=range`.

    Raises:
        ValueError: it is no such word; it says what is wrong and what would be right.
    """
    name, equals, written = text.partition("=")
    name, written = name.strip(), written.strip()
    if not equals or not name or not written:
        raise ValueError(f"--space {text!r}: write name=range, e.g. optim.lr=log(1e-5,1e-3) or encoder.dim=[128,512]")
    try:
        if written.startswith("["):
            return name, _choice(written)
        return name, _range(written)
    except ValueError as error:
        raise ValueError(f"--space {name}: {error}") from None


def _choice(written: str) -> Choice:
    if not written.endswith("]"):
        raise ValueError(f"{written!r} has no closing bracket")
    words = [word.strip() for word in written[1:-1].split(",")]
    if "" in words:
        raise ValueError(f"{written!r} has an empty place; write values between commas, e.g. [128,512]")
    values = tuple(_value(word) for word in words)
    for index, value in enumerate(values):
        if Choice(values[:index]).holds(value):
            raise ValueError(f"{written} names {value} twice")
    return Choice(values)


def _value(word: str) -> Value:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if not _NUMBER.fullmatch(word):
        return word
    return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)


def _range(written: str) -> Range:
    called = _CALL.fullmatch(written)
    if called is None:
        raise ValueError(f"{written!r} is none of uniform(low,high), log(low,high), int(low,high), [a,b,c]")
    kind, ends = called[1], [word.strip() for word in called[2].split(",")]
    kinds = ("uniform", "log", "int")
    if kind not in kinds:
        raise ValueError(unknown("range", kind, [*kinds, "[a,b,c]"]))
    if len(ends) != 2 or not all(_NUMBER.fullmatch(end) for end in ends):
        raise ValueError(f"{written} needs two numbers, {kind}(low,high)")
    low, high = (float(end) for end in ends)
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"{written} has an end beyond what a number holds")
    if kind == "int" and not (low.is_integer() and high.is_integer()):
        raise ValueError(f"{written} needs whole numbers; uniform(low,high) takes others")
    if low >= high:
        raise ValueError(f"{written} needs low < high, got {low:g} and {high:g}")
    if kind == "log" and low <= 0:
        raise ValueError(f"{written} needs low > 0, got {low:g}: a log scale has no 0")
    return Range(kind, low, high)
