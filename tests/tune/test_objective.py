"""Which trial wins: the best score that does not buy consistency with Recall@1."""

import pytest

from tune.objective import Outcome, baseline, winner


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
