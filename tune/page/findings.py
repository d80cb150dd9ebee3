"""What a search found, all that its page shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dml.config import Config
from tune.finals import Finals
from tune.objective import Objective, Outcome, baseline, ranked
from tune.ranges import Value
from tune.space import Space
from tune.tested import Tested


@dataclass(frozen=True)
class Findings:
    """What a search found.

    Attributes:
        name: of the search.
        outcomes: its trials, in any order and state.
        objective: what it looked for.
        space: what it varied.
        config: the recipe's settings.
        chosen: the trial that won; None where none finished.
        finals: the finalists over seeds, where there were any.
        tested: the winner on test classes, where it was measured.
        tested_baseline: the baseline on the same classes, where it was measured.
        importances: share of each parameter in the variance of a figure, by figure (`tune.page.importance.shares`).
        options: of the command line beside the recipe's settings, by name.
        facts: further lines of how it ran, by name, such as when it ended.
        command: that ran it, without secrets.
        toy: whether val or test holds too few classes to say anything about OPIS.
    """

    name: str
    outcomes: Sequence[Outcome]
    objective: Objective
    space: Space
    config: Config
    chosen: Outcome | None = None
    finals: Finals | None = None
    tested: Tested | None = None
    tested_baseline: Tested | None = None
    importances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    toy: bool = False

    @property
    def baseline(self) -> Outcome | None:
        """Trial 0, where it finished."""
        return baseline(self.outcomes)

    @property
    def finished(self) -> list[Outcome]:
        """The trials that finished, by number."""
        return sorted(self.of_state("finished"), key=lambda outcome: outcome.number)

    @property
    def judged(self) -> list[Outcome]:
        """The finished trials that can win, best first."""
        return ranked(self.outcomes, self.objective.tolerance, self.objective.mode) if self.finished else []

    @property
    def names(self) -> list[str]:
        """The settings that trials differ in: TCM's first, then the others, as the space has them."""
        found = {name for outcome in self.outcomes for name in outcome.settings if name != "train.seed"}
        order = ["tcm.margin_pos", "tcm.margin_neg", *self.space.ranges]
        return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))

    @property
    def compared(self) -> tuple[Outcome | None, Outcome | None]:
        """The baseline and the winner on val classes: means over the seeds where there were finals."""
        if self.finals is not None:
            return baseline(self.finals.means), self.finals.winner
        return self.baseline, self.chosen

    def of_state(self, state: str) -> list[Outcome]:
        """The trials of a state, in the order of the search."""
        return [outcome for outcome in self.outcomes if outcome.state == state]


def value_of(outcome: Outcome, name: str) -> Value:
    """A setting of a trial; None for those of TCM where it is off."""
    off = outcome.settings.get("tcm.weight") == 0
    return None if off and name.startswith("tcm.") else outcome.settings.get(name)


def shown(value: Value) -> str:
    """A setting in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def described(outcome: Outcome, names: Sequence[str]) -> str:
    """What a trial varies, in one line."""
    found = [(name.removeprefix("tcm."), value_of(outcome, name)) for name in names if name in outcome.settings]
    return ", ".join(f"{name} {shown(value)}" for name, value in found if value is not None)
