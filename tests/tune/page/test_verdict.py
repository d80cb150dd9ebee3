"""What the page says in words: the figures that it names, and each doubt where it has a cause and nowhere else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dml import recipes
from dml.metrics.threshold import ThresholdCurves
from tests.tune.page.fabricated import curves, findings
from tune import finals, tested
from tune.objective import Objective, Outcome
from tune.page import Findings, verdict
from tune.space import Space


def trial(number: int, recall: float, opis: float, floor: float = 0.0001, **settings: float) -> Outcome:
    metrics = {"best/recall@1": recall, "best/opis": opis, "best/opis_noise_floor": floor, "best/mean_utility": 0.97}
    varied = {f"tcm.{name}": value for name, value in settings.items()} or {"tcm.weight": 0.0}
    return Outcome(number, "finished", varied, {**metrics, "best/score": recall - opis**0.5})


def on_test(recall: float, opis: float, floor: float = 0.0001, lines: ThresholdCurves | None = None) -> tested.Tested:
    metrics = {"recall@1": recall, "opis": opis, "opis_noise_floor": floor, "mean_utility": 0.9, "score": 0.8}
    return tested.Tested({f"test/{name}": value for name, value in metrics.items()}, lines, 7, ())


BASELINE = trial(0, 0.9000, 0.0016)
WINNER = trial(1, 0.9125, 0.0012, weight=0.1, margin_pos=0.8, margin_neg=0.4, start=0.3)


def search(*outcomes: Outcome, **more: object) -> Findings:
    config = recipes.glyphs()
    found = Findings("s", outcomes, Objective(), Space.of([], config), config, chosen=WINNER)
    return replace(found, **more)  # type: ignore[arg-type]


def doubts(findings: Findings) -> str:
    return " | ".join(verdict.doubts(findings))


def test_it_says_what_was_searched_what_won_and_by_how_much() -> None:
    tested = {"tested_baseline": on_test(0.91, 0.0020), "tested": on_test(0.92, 0.0019)}
    searched, won, test = verdict.paragraphs(search(BASELINE, WINNER, **tested))
    assert searched == (
        "2 trials on glyphs (encoder small_cnn, loss multi_similarity) searched TCM's margin_pos, margin_ratio, weight "
        "and start, for the best Recall@1 - sqrt(OPIS) with Recall@1 at most 0.5 points below the baseline, which has "
        "no TCM: 2 finished."
    )
    assert won == (
        "Trial 1 won (margin_pos 0.8, margin_neg 0.4, weight 0.1, start 0.3). On val classes, by which it was chosen: "
        "Recall@1 0.9125, +1.25 points from the baseline's 0.9000; OPIS 0.00120, -25.0 % from its 0.00160 (noise floor "
        "0.00010)."
    )
    assert test == (
        "On 7 test classes, which no choice has seen: Recall@1 0.9200, +1.00 points from the baseline's 0.9100; OPIS "
        "0.00190, -5.0 % from its 0.00200 (noise floor 0.00010)."
    )


def test_finals_speak_for_their_means_with_intervals_over_seeds() -> None:
    runs = []
    for seed, gain in ((1, 0.01), (2, 0.02), (3, 0.03)):
        runs += [
            replace(trial(0, 0.90, 0.0016), settings={"tcm.weight": 0.0, "train.seed": seed}),
            replace(trial(1, 0.90 + gain, 0.0016 - gain / 100), settings={"tcm.weight": 0.1, "train.seed": seed}),
        ]
    judged = finals.judge(runs, 0.005, "combined")
    found = search(BASELINE, WINNER, finals=judged)
    said = verdict.paragraphs(found)[1]
    assert "in the mean over 3 new seeds: Recall@1 0.9200, +2.00 points from the baseline's 0.9000" in said
    # By hand: mean 2, standard deviation 1, t of 2 degrees of freedom 4.3027, over the root of 3.
    assert (
        "with 95 % intervals over seeds: Recall@1 +2.00 points (-0.48 to +4.48), OPIS -0.00020 (-0.00045 to +0.00005)"
        in said
    )
    assert "Over 3 seeds the change of Recall@1 may be none" in doubts(found)
    assert "Over 3 seeds the change of OPIS may be none" in doubts(found)
    assert "One seed decided" not in doubts(found)


def test_a_change_on_test_has_an_interval_over_classes() -> None:
    before, after = curves(1.0, 30), curves(0.5, 30)
    tested = {"tested_baseline": on_test(0.9, 0.02, lines=before), "tested": on_test(0.9, 0.01, lines=after)}
    said = verdict.paragraphs(search(BASELINE, WINNER, **tested))[2]
    assert "(95 % interval over classes -" in said
    same = {"tested_baseline": on_test(0.9, 0.02, lines=before), "tested": on_test(0.9, 0.02, lines=curves(1.0, 30))}
    assert "its 95 % interval over classes holds 0" in doubts(search(BASELINE, WINNER, **same))
    assert "its 95 % interval over classes holds 0" not in doubts(search(BASELINE, WINNER, **tested))


def test_the_baseline_may_win_and_none_may() -> None:
    said = " ".join(verdict.paragraphs(search(BASELINE, WINNER, chosen=BASELINE, tested=on_test(0.9, 0.001))))
    assert "The baseline without TCM won: nothing that was tried beats it within the tolerance." in said
    assert "from the baseline's" not in said
    failed = Outcome(0, "failed", {"tcm.weight": 0.0}, error="OutOfMemoryError: 80 GiB")
    none = search(failed, chosen=None)
    assert (
        "No trial finished, so nothing was chosen. The first failure: OutOfMemoryError: 80 GiB."
        in verdict.paragraphs(none)
    )
    assert verdict.doubts(none) == []


def test_each_doubt_has_its_cause() -> None:
    sound = search(BASELINE, WINNER, tested_baseline=on_test(0.90, 0.0016), tested=on_test(0.91, 0.0012))
    alone = "One seed decided. The best of 2 trials is in part the luckiest, and OPIS differs between seeds; --seeds 5 "
    assert verdict.doubts(sound) == [alone + "trains the finalists and the baseline again over new seeds."]

    failed = Outcome(2, "failed", error="NaN")
    for changed, words in (
        (replace(sound, outcomes=(WINNER,)), "The baseline did not finish"),
        (replace(sound, toy=True), "a toy: OPIS over them says little"),
        (replace(sound, outcomes=(BASELINE, WINNER, failed)), "1 of 3 trials failed"),
        (
            replace(sound, tested=on_test(0.91, 0.0017)),
            "its OPIS is not better than the baseline's but larger, though it is smaller on val",
        ),
        (replace(sound, tested=on_test(0.89, 0.0012)), "Recall@1 lies 1.00 points below the baseline's, more than the"),
        (replace(sound, tested=on_test(0.91, 0.0012, floor=0.0008)), "OPIS on test is 1.5 times its noise floor"),
    ):
        assert words not in doubts(sound)
        assert words in doubts(changed)


def test_a_winner_at_the_edge_of_the_space_is_named() -> None:
    """tcm.weight is searched over log(0.01,1); 0.0105 is within 3 % of its length on the log scale, 0.02 is not."""
    for weight, named in ((0.0105, True), (0.02, False)):
        edge = replace(WINNER, settings={**WINNER.settings, "tcm.weight": weight})
        said = doubts(search(BASELINE, edge, chosen=edge))
        assert ("The winner's tcm.weight 0.0105 lies at the edge of log(0.01,1)" in said) is named


@pytest.mark.parametrize("mode", ["combined", "constrained", "pareto"])
def test_a_whole_search_is_told_in_every_mode(tmp_path: Path, mode: str) -> None:
    states = {3: "failed", 4: "pruned", 5: "unfinished"}
    found = findings(tmp_path, mode=mode, trials=8, states=states)  # type: ignore[arg-type]
    said = " ".join(verdict.paragraphs(found))
    assert "5 finished, 1 stopped early, 1 failed, 1 did not end" in said
    assert found.chosen is not None
    assert f"Trial {found.chosen.number} won" in said
    assert f"Recall@1 {found.chosen.recall:.4f}" in said
    assert not np.isnan(found.chosen.opis)
