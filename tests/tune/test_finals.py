"""Finalists over paired seeds: who takes part, whose mean wins, and how sure a difference is."""

import numpy as np
import pytest
from scipy import stats

from tune import finals
from tune.objective import Outcome


def run(number: int, seed: int, recall: float, opis: float, state: str = "finished") -> Outcome:
    metrics = {"best/recall@1": recall, "best/opis": opis, "best/score": recall - opis**0.5}
    settings = {"tcm.weight": 0.1 * number, "train.seed": seed}
    error = "loss is nan" if state == "failed" else ""
    return Outcome(number, state, settings, metrics, checkpoint=f"{number}/{seed}", error=error)


def test_the_finalists_are_the_best_and_the_baseline() -> None:
    outcomes = [run(number, 0, 0.9, 0.01 * number) for number in range(1, 6)] + [run(0, 0, 0.9, 0.03)]
    assert [o.number for o in finals.finalists(outcomes, 2, 0.005, "combined")] == [0, 1, 2]
    assert [o.number for o in finals.finalists(outcomes[:-1], 2, 0.005, "constrained")] == [1, 2]
    assert [o.number for o in finals.finalists(outcomes[-1:], 2, 0.005, "combined")] == [0]


def test_each_seed_trains_all_of_them() -> None:
    chosen = [run(0, 0, 0.9, 0.01), run(3, 0, 0.9, 0.01)]
    points = finals.points(chosen, [7, 8])
    assert [(point["number"], point["train.seed"]) for point in points] == [(0, 7), (3, 7), (0, 8), (3, 8)]
    assert [point["tcm.weight"] for point in points] == pytest.approx([0, 0.3, 0, 0.3])


def test_the_mean_wins_not_the_luckiest_seed() -> None:
    lucky = [run(1, 1, 0.99, 0.0), run(1, 2, 0.90, 0.04), run(1, 3, 0.90, 0.04)]
    steady = [run(2, seed, 0.93, 0.0049) for seed in (1, 2, 3)]
    baseline = [run(0, seed, 0.92, 0.01) for seed in (1, 2, 3)]
    found = finals.judge([*lucky, *steady, *baseline], 0.005, "combined")
    assert found.winner.number == 2
    assert found.winner.recall == pytest.approx(0.93)
    assert [outcome.number for outcome in found.means] == [1, 2, 0]


def test_the_tolerance_bounds_the_mean_recall() -> None:
    runs = [run(1, 1, 0.93, 0.0), run(1, 2, 0.89, 0.0), run(2, 1, 0.88, 0.0), run(2, 2, 0.90, 0.0)]
    baseline = [run(0, seed, 0.90, 0.04) for seed in (1, 2)]
    assert finals.judge([*baseline, *runs], 0.0, "constrained").winner.number == 1
    assert finals.judge([*baseline, *runs[2:]], 0.0, "constrained").winner.number == 0


def test_differences_are_paired_and_their_interval_is_students() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.random(5), rng.random(5)
    runs = [run(0, seed, before[seed], 0.01) for seed in range(5)] + [
        run(1, seed, after[seed], 0.01) for seed in range(5)
    ]
    found = finals.judge(runs, 1.0, "combined").difference(1, "best/recall@1")
    assert found is not None
    low, high = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert found.mean == pytest.approx((after - before).mean())
    assert found.interval == pytest.approx((low, high))


def test_one_pair_has_no_interval() -> None:
    assert finals.paired([0.25]) == finals.Difference(0.25, None)


def test_a_finalist_that_missed_a_seed_does_not_take_part_but_a_seed_without_baseline_does_not_count() -> None:
    runs = [
        *(run(0, 1, 0.9, 0.01), run(0, 2, 0.9, 0.01), run(0, 3, 0.9, 0.01, "failed")),
        *(run(1, 1, 0.95, 0.01), run(1, 2, 0.95, 0.01), run(1, 3, 0.0, 0.2)),
        *(run(2, 1, 0.99, 0.0), run(2, 2, 0.99, 0.0, "failed"), run(2, 3, 0.99, 0.0)),
    ]
    found = finals.judge(runs, 0.005, "combined")
    assert found.seeds == (1, 2)
    assert [outcome.number for outcome in found.means] == [0, 1]
    assert found.winner.recall == pytest.approx(0.95)


def test_without_a_baseline_the_seeds_count_that_all_finished() -> None:
    runs = [run(0, 1, 0.9, 0.01, "failed"), run(1, 1, 0.9, 0.01), run(1, 2, 0.9, 0.01), run(2, 2, 0.8, 0.01)]
    found = finals.judge(runs, 0.005, "combined")
    assert found.seeds == (2,)
    assert found.winner.number == 1
    assert found.difference(1, "best/opis") is None
    assert found.model()[1] is None


def test_the_model_is_the_winners_best_run_and_the_baselines_of_the_same_seed() -> None:
    runs = [run(0, 1, 0.95, 0.01), run(0, 2, 0.90, 0.01), run(1, 1, 0.96, 0.01), run(1, 2, 0.97, 0.01)]
    model, baseline = finals.judge(runs, 0.005, "combined").model()
    assert baseline is not None
    assert (model.checkpoint, baseline.checkpoint) == ("1/2", "0/2")


def test_when_none_finished_the_first_cause_is_said() -> None:
    with pytest.raises(ValueError, match="no finalist finished; the first failure: loss is nan"):
        finals.judge([run(0, 1, 0, 0, "failed"), run(1, 1, 0, 0, "failed")], 0.005, "combined")
