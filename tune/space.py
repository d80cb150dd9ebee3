"""The space that Optuna searches: TCM's margins, weight and start, and whatever settings a person adds."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import pydantic

from dml.config import Config
from dml.names import unknown
from tune.ranges import Choice, Range, Value, parse

if TYPE_CHECKING:
    from optuna import Trial

Point = dict[str, Value]

MARGIN_RATIO = "margin_ratio"
"""margin_neg / margin_pos: what is sampled in the place of margin_neg, so that it always lies below margin_pos."""

TCM: dict[str, Range | Choice] = {
    "tcm.margin_pos": Range("uniform", 0.4, 0.95),
    MARGIN_RATIO: Range("uniform", 0.0, 0.95),
    # From scratch all similarities begin near 1, and TCM at full weight from the first step holds the encoder there.
    "tcm.weight": Range("log", 0.01, 1.0),
    "tcm.start": Range("uniform", 0.0, 0.6),
}
PAPER = {"tcm.margin_pos": 0.9, "tcm.margin_neg": 0.5}
"""The margins of Zhang et al., ICLR 2024, arXiv 2307.04047."""
_FIRST = {"tcm.weight": 0.1, "tcm.start": 0.0}  # what also works from scratch, unlike the paper's weight of 1
_FIXED = {  # what decides on which classes and by which figures trials are judged
    "data.": "trials would not see the same classes; of data, data.image_size and data.augment may vary",
    "evaluate.": "trials would not be judged by the same figures",
    "train.seed": "the best of several seeds is luck; --seeds trains the finalists over several",
}
_FREE = ("data.image_size", "data.augment")


@dataclass(frozen=True)
class Space:
    """What is searched, around the settings of a recipe. Make one with `Space.of`.

    TCM is on or off, and its own parameters are there only where it is on. Trial 0 is the baseline: TCM off and the
    recipe's own settings, also where they lie outside what is searched.

    Attributes:
        config: the recipe's settings, with TCM off.
        tcm: TCM's parameters, by Optuna's names.
        others: further settings, searched with TCM on and off.
        flat: every trial names every parameter, also TCM's where it is off: for samplers that know no conditions.
    """

    config: Config
    tcm: Mapping[str, Range | Choice] = field(default_factory=lambda: dict(TCM))
    others: Mapping[str, Range | Choice] = field(default_factory=dict)
    flat: bool = False

    @classmethod
    def of(cls, words: Sequence[str], config: Config, *, flat: bool = False) -> Self:
        """The default space with what --space says put in or added.

        Args:
            words: `name=range` each (see `tune.ranges`); a loss's option may be named loss.option.
            config: the recipe's settings.
            flat: see the attribute.

        Raises:
            ValueError: no such range, or one that its setting refuses, or margins that could cross.
            KeyError: no such setting; it lists the nearest ones.
        """
        config = config.replace(**{"tcm.weight": 0.0})
        tcm, others = dict(TCM), {}
        seen: set[str] = set()
        for word in words:
            written, values = parse(word)
            name = _setting(written, config)
            if name in seen:
                raise ValueError(f"--space {name} is given twice")
            seen.add(name)
            values = _named_none(name, values, config)
            _check(name, values, config)
            if name.startswith("tcm."):
                tcm[name] = values
            else:
                others[name] = values
        if "tcm.margin_neg" in tcm:
            del tcm[MARGIN_RATIO]
            _check_order(tcm["tcm.margin_neg"], tcm["tcm.margin_pos"])
        return cls(config, tcm, others, flat)

    @property
    def ranges(self) -> dict[str, Range | Choice]:
        """Everything that is sampled beside on and off, by Optuna's names."""
        return {**self.tcm, **self.others}

    def suggest(self, trial: "Trial") -> Point:
        """Optuna's define-by-run form of the space.

        Returns:
            What follows from what was sampled, or takes its place: the trial's number, margin_neg, weight 0 where TCM
            is off, and of a flat space the baseline's settings that lie outside.
        """
        off = trial.suggest_categorical("tcm", ["off", "on"]) == "off"
        derived: Point = {"number": trial.number}
        for name, values in self.others.items():
            # Where the recipe lies outside the range, the baseline keeps to the recipe.
            outside = trial.number == 0 and not values.holds(self.config.flat.get(name))
            if self.flat or not outside:
                values.suggest(trial, name)
            if self.flat and outside:
                derived[name] = self.config.flat.get(name)
        if self.flat or not off:
            for name, values in self.tcm.items():
                values.suggest(trial, name)
            if MARGIN_RATIO in self.tcm:
                margin = trial.params["tcm.margin_pos"] * trial.params[MARGIN_RATIO]
                derived["tcm.margin_neg"] = round(margin, 6)
        return {**derived, "tcm.weight": 0.0} if off else derived

    def first_points(self) -> list[Point]:
        """The points that are tried first: the baseline, and the paper's margins where they lie in the space."""
        own = self._recipe()
        baseline = {**self._tcm_point(PAPER), **self._nearest()} if self.flat else {}
        points: list[Point] = [{"tcm": "off", **baseline, **own}]
        paper = self._tcm_point(PAPER)
        if paper["tcm.margin_pos"] == PAPER["tcm.margin_pos"] and self._margin_neg(paper) == PAPER["tcm.margin_neg"]:
            points.append({"tcm": "on", **paper, **own})
        return points

    def designed(self, baseline: Mapping[str, float]) -> Point | None:
        """Margins designed from the baseline's own similarities: the point nearest to them in the space.

        A positive is then hard where some threshold of OPIS's calibration range rejects it, or where it is among the
        far_max least similar; a negative where some threshold of the range accepts it. So margin_pos is the similarity
        that a share far_min of the negatives reach, or the one that a share far_max of the positives stay below where
        that is larger, and margin_neg the similarity that a share far_max of the negatives reach.

        Args:
            baseline: the metrics that its trial reported.

        Returns:
            None where the baseline has not reported them, or is collapsed.
        """
        names = ("similarity_at_far_min", "similarity_at_frr_max", "similarity_at_far_max")
        if not all(f"val/{name}" in baseline for name in names):
            return None
        far_min, frr_max, far_max = (baseline[f"val/{name}"] for name in names)
        positive = max(far_min, frr_max)
        if positive <= max(0.0, far_max):
            return None
        margins = {"tcm.margin_pos": positive, "tcm.margin_neg": far_max}
        return {"tcm": "on", **self._tcm_point(margins), **self._recipe()}

    def grid(self, points: int, *, seed: int) -> list[Point]:
        """Every combination of so many values of each range, TCM on, in an order drawn by the seed.

        Drawn, so that a search with fewer trials still sees the whole of the space.
        """
        names = [*self.ranges]
        rows = itertools.product(*(self.ranges[name].grid(points) for name in names))
        found: list[Point] = [{"tcm": "on", **dict(zip(names, row, strict=True))} for row in rows]
        random.Random(seed).shuffle(found)  # noqa: S311  # an order, not a secret
        return found

    def grid_size(self, points: int) -> int:
        """How many combinations `grid` has."""
        size = 1
        for values in self.ranges.values():
            size *= len(values.grid(points))
        return size

    def __str__(self) -> str:
        return "  ".join(f"{name}={values}" for name, values in self.ranges.items())

    def _recipe(self) -> Point:
        """The recipe's own values of the other settings, of those that lie in the space."""
        own = {name: self.config.flat.get(name) for name in self.others}
        return {name: value for name, value in own.items() if self.others[name].holds(value)}

    def _nearest(self) -> Point:
        """What stands for the recipe's values of the other settings where they lie outside the space."""
        own = self.config.flat
        numbers = {name: value for name, value in own.items() if isinstance(value, int | float)}
        return {name: values.nearest(numbers.get(name, 0.0)) for name, values in self.others.items()}

    def _tcm_point(self, margins: Mapping[str, float]) -> Point:
        """TCM's parameters at these margins, each at the nearest value that its range has."""
        wanted = {**_FIRST, **margins}
        wanted[MARGIN_RATIO] = wanted["tcm.margin_neg"] / wanted["tcm.margin_pos"]
        return {
            name: values.nearest(float(wanted.get(name, self.config.flat.get(name) or 0.0)))
            for name, values in self.tcm.items()
        }

    def _margin_neg(self, point: Mapping[str, Value]) -> float:
        if MARGIN_RATIO not in self.tcm:
            return float(point["tcm.margin_neg"] or 0)
        return round(float(point["tcm.margin_pos"] or 0) * float(point[MARGIN_RATIO] or 0), 6)


def settings(params: Mapping[str, Value]) -> Point:
    """The settings among the parameters of a trial, by dotted name; of TCM only weight 0 where it is off.

    An option of the loss that is None, which none can be, is left to the loss.
    """
    off = params.get("tcm") == "off"
    found = {
        name: value
        for name, value in params.items()
        if "." in name
        and not (off and name.startswith("tcm."))
        and not (value is None and name.startswith("loss.options."))
    }
    return {**found, "tcm.weight": 0.0} if off else found


def _setting(name: str, config: Config) -> str:
    """The dotted name of a setting; a loss's option may be written without "options"."""
    own = [known for known in config.flat if not known.startswith("loss.options.")]
    if name in own or name.startswith("loss.options."):
        found = name
    elif name.startswith("loss."):
        found = f"loss.options.{name.removeprefix('loss.')}"
        _check_option(found, name, config, own)
    else:
        raise KeyError(unknown("setting", name, own))
    for prefix, why in _FIXED.items():
        if found.startswith(prefix) and found not in _FREE:
            raise ValueError(f"--space {found}: {why}")
    return found


def _check_option(option: str, name: str, config: Config, settings: Sequence[str]) -> None:
    import inspect

    from dml.losses import LOSSES

    loss = LOSSES.get(config.loss.name)
    if loss is None:
        return  # from outside: it is asked for the values of the range
    takes = [known for known in inspect.signature(loss).parameters if known not in (*loss.needs, "miner", "rho")]
    if option.removeprefix("loss.options.") not in takes:
        valid = [f"loss.{known}" for known in takes] + [known for known in settings if known.startswith("loss.")]
        raise KeyError(unknown(f"setting of loss {config.loss.name}", name, valid))


def _named_none(name: str, values: Range | Choice, config: Config) -> Range | Choice:
    """`none` as the word, for a setting that has a value of this name."""
    if not isinstance(values, Choice) or None not in values.values:
        return values
    try:
        config.replace(**{name: None})
        return values
    except ValueError:
        return Choice(tuple("none" if value is None else value for value in values.values))


def _check(name: str, values: Range | Choice, config: Config) -> None:
    """Refuses a range that its setting does not take, tried at the ends and between."""
    from dml import encoders, losses

    for value in values.samples():
        changes: dict[str, Value] = {name: value}
        if name in ("tcm.margin_pos", "tcm.margin_neg"):
            # Each margin alone: that they keep their order is checked of both ranges together.
            changes |= {"tcm.margin_pos": 1.0, "tcm.margin_neg": -1.0, name: value}
        try:
            changed = config.replace(**changes)
            if name.startswith("loss."):
                losses.from_config(changed.loss, num_classes=2, dim=2)
            if name.startswith("encoder."):
                encoders.check(changed.encoder)
        except pydantic.ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            whole = "; int(low,high) gives whole numbers" if "valid integer" in message else ""
            raise ValueError(f"--space {name}={values}: {name} {value} is refused: {message}{whole}") from None
        except (ValueError, KeyError) as error:
            raise ValueError(f"--space {name}={values}: {name} {value} is refused: {error.args[0]}") from None


def _check_order(negative: Range | Choice, positive: Range | Choice) -> None:
    def ends(values: Range | Choice) -> list[float]:
        return [float(value) for value in values.samples() if isinstance(value, int | float)]

    if max(ends(negative)) >= min(ends(positive)):
        raise ValueError(
            f"--space tcm.margin_neg={negative} can reach tcm.margin_pos={positive}; give ranges that do not touch, or "
            f"leave tcm.margin_neg out: {MARGIN_RATIO}, its share of tcm.margin_pos, is then searched"
        )
