"""Which trial wins: the best score that does not buy consistency with Recall@1."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune.objective import Outcome, baseline, front, knee, ranked, violation, winner


def outcome(number: int, recall: float, opis: float, state: str = "finished") -> Outcome:
    metrics = {"best/recall@1": recall, "best/opis": opis, "best/score": recall - opis**0.5}
    return Outcome(number, state, metrics=metrics, error="loss is nan" if state == "failed" else "")


def test_the_best_score_wins() -> None:
    outcomes = [outcome(0, 0.95, 0.01), outcome(1, 0.95, 0.0025), outcome(2, 0.96, 0.01)]
    assert winner(outcomes, tolerance=0.005).number == 1


def test_a_collapsed_encoder_does_not_win_by_its_opis() -> None:
    outcomes = [outcome(0, 0.9000, 0.04), outcome(1, 0.8949, 0.0), outcome(2, 0.8951, 0.01)]
    assert winner(outcomes, tolerance=0.005).number == 2


def test_the_baseline_itself_can_win() -> None:
    outcomes = [outcome(0, 0.95, 0.0025), outcome(1, 0.95, 0.01), outcome(2, 0.90, 0.0)]
    assert winner(outcomes, tolerance=0.005).number == 0


def test_failed_and_unfinished_trials_do_not_take_part() -> None:
    outcomes = [outcome(0, 0.9, 0.01), outcome(1, 0.99, 0.0, "failed"), outcome(2, 0.99, 0.0, "unfinished")]
    assert winner(outcomes, tolerance=0.005).number == 0


def test_without_a_baseline_there_is_no_bound() -> None:
    outcomes = [outcome(0, 0.9, 0.01, "failed"), outcome(1, 0.5, 0.0)]
    assert baseline(outcomes) is None
    assert winner(outcomes, tolerance=0.005).number == 1


def test_when_every_trial_failed_the_first_cause_is_said() -> None:
    with pytest.raises(ValueError, match="no trial of 2 finished; the first failure: loss is nan"):
        winner([outcome(0, 0, 0, "failed"), outcome(1, 0, 0, "failed")], tolerance=0.005)


def test_a_trial_that_was_stopped_early_cannot_win() -> None:
    outcomes = [outcome(0, 0.9, 0.01), outcome(1, 0.99, 0.0, "pruned")]
    assert winner(outcomes, tolerance=0.005).number == 0


def test_constrained_takes_the_least_opis_whatever_the_score() -> None:
    outcomes = [outcome(0, 0.900, 0.0100), outcome(1, 0.990, 0.0090), outcome(2, 0.896, 0.0080), outcome(3, 0.5, 0.0)]
    assert winner(outcomes, 0.005, "constrained").number == 2
    assert winner(outcomes, 0.0, "constrained").number == 1
    assert winner(outcomes, 0.005, "combined").number == 1


def test_a_constraint_is_kept_where_it_is_at_most_zero() -> None:
    assert violation(recall=0.90, reference=0.90, tolerance=0.005) < 0
    assert violation(recall=0.89, reference=0.90, tolerance=0.005) == pytest.approx(0.005)


def test_pareto_takes_the_knee() -> None:
    """Trial 2 gives up little of either figure; 1 and 3 each give up nearly all of one."""
    outcomes = [
        outcome(0, 0.90, 0.05),
        outcome(1, 0.99, 0.0400),
        outcome(2, 0.98, 0.0100),
        outcome(3, 0.90, 0.0081),
        outcome(4, 0.97, 0.0200),
    ]
    assert [o.number for o in front(outcomes)] == [1, 2, 3]
    assert winner(outcomes, 0.005, "pareto").number == 2
    assert [o.number for o in ranked(outcomes, 0.005, "pareto")] == [2, 3, 1, 4, 0], "knee, front and others by score"


def test_a_front_without_a_knee_gives_its_best_score() -> None:
    straight = [outcome(1, 0.99, 0.2**2), outcome(2, 0.98, 0.3**2 * 0.3), outcome(3, 0.90, 0.1**2)]
    dented = [outcome(1, 0.99, 0.2**2), outcome(2, 0.91, 0.19**2), outcome(3, 0.90, 0.1**2)]
    assert knee(straight[:1]).number == 1
    assert knee(dented).number == 3
    with pytest.raises(ValueError, match="needs a finished trial"):
        knee([])


points = st.lists(
    st.tuples(st.sampled_from([0.1 * i for i in range(11)]), st.sampled_from([0.01 * i for i in range(11)]))
)


@given(points)
def test_the_front_is_what_no_trial_beats(figures: list[tuple[float, float]]) -> None:
    outcomes = [outcome(number, *figure) for number, figure in enumerate(figures)]
    beaten = {
        (a.recall, a.opis)
        for a in outcomes
        for b in outcomes
        if b.recall >= a.recall and b.opis <= a.opis and (b.recall, b.opis) != (a.recall, a.opis)
    }
    found = front(outcomes)
    assert {(o.recall, o.opis) for o in found} == {*figures} - beaten
    assert len(found) == len({(o.recall, o.opis) for o in found}), "of equal trials one"
    if found:
        # An oracle in coordinates of its own: twice the area of the triangle over the line between the ends.
        a, b = found[0], found[-1]
        x, y = lambda o: o.recall, lambda o: -math.sqrt(o.opis)

        def over(o: Outcome) -> float:
            return (x(o) - x(b)) * (y(b) - y(a)) - (y(o) - y(b)) * (x(b) - x(a))

        best = max(found, key=over)
        if len(found) > 2 and over(best) > 1e-9:
            assert over(knee(outcomes)) == pytest.approx(over(best))
