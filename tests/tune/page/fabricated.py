"""Searches that no training was needed for: real Optuna studies in SQLite, with figures from a formula."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna

from dml import recipes
from dml.metrics.threshold import ThresholdCurves, mean_utility, noise_floor, opis, threshold_curves
from tune import finals, sampler, storage
from tune.objective import Mode, Objective, Outcome, winner
from tune.page import Findings
from tune.page.importance import shares
from tune.sampler import SamplerName
from tune.space import Space, settings
from tune.tested import Tested


def findings(
    folder: Path,
    *,
    mode: Mode = "combined",
    trials: int = 24,
    words: Sequence[str] = (),
    states: dict[int, str] | None = None,
    seeds: int = 0,
    tested: bool = True,
    classes: int = 24,
    name: str = "fabricated",
    by: SamplerName = "tpe",
) -> Findings:
    """What a search of so many trials came to, some of them in other states than finished."""
    config, objective = recipes.glyphs(), Objective(mode=mode)
    space = Space.of(words, config, flat=by in sampler.FLAT)
    study = optuna.create_study(
        storage=storage.connect(f"sqlite:///{folder / 'optuna.db'}"),
        study_name=name,
        directions=["maximize" if way == "max" else "minimize" for way in objective.metrics.values()],
        sampler=sampler.build(by, seed=0, trials=trials),
    )
    for point in space.first_points()[:trials]:
        study.enqueue_trial(point)
    outcomes = [_trial(study, space, objective, (states or {}).get(number, "finished")) for number in range(trials)]
    finished = [outcome for outcome in outcomes if outcome.state == "finished"]
    chosen = winner(outcomes, objective.tolerance, mode) if finished else None
    over_seeds = None
    if seeds and chosen is not None:
        over_seeds = _finals(outcomes, objective, seeds)
        chosen = next(outcome for outcome in outcomes if outcome.number == over_seeds.winner.number)
    before = _tested(1.0, classes) if tested and outcomes[0].state == "finished" else None
    after = before if chosen is not None and chosen.number == 0 else _tested(0.75, classes)
    return Findings(
        name=name,
        outcomes=outcomes,
        objective=objective,
        space=space,
        config=config,
        chosen=chosen,
        finals=over_seeds,
        tested=after if tested and chosen is not None else None,
        tested_baseline=before,
        importances=shares(study),
        options={"trials": trials, "sampler": by},
        facts={"ended": "2026-11-22 10:00"},
        command=f"python -m tune.search --trials {trials} --objective.mode {mode}",
    )


def _trial(study: optuna.Study, space: Space, objective: Objective, state: str) -> Outcome:
    trial = study.ask()
    derived = space.suggest(trial)
    varied = settings({**trial.params, **derived})
    metrics = _figures(trial.number, varied)
    if state in ("failed", "unfinished"):
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        error = "NonFiniteLossError: loss is nan at step 12; last losses: 0.31, nan" if state == "failed" else ""
        return Outcome(trial.number, state, varied, error=error)
    for name, value in {"recall@1": "best/recall@1", "opis": "best/opis", "score": "best/score"}.items():
        trial.set_user_attr(name, metrics[value])
    if state == "pruned":
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, [metrics[metric] for metric in objective.metrics])
    return Outcome(trial.number, state, varied, metrics, checkpoint="somewhere", seconds=41.0 + trial.number)


def _figures(seed: int, varied: dict[str, str | int | float | bool | None]) -> dict[str, float]:
    """Recall@1 best near margins 0.85 and 0.35, OPIS less with weight, and a weight too large collapses a little."""
    noise = np.random.default_rng(seed).normal(size=2)
    weight, positive, negative = (float(varied.get(f"tcm.{n}") or 0) for n in ("weight", "margin_pos", "margin_neg"))
    gain = np.exp(-((positive - 0.85) ** 2) / 0.05 - (negative - 0.35) ** 2 / 0.1) if weight else 0.0
    recall = 0.92 + 0.02 * gain - 0.05 * max(0.0, weight - 0.4) + 0.002 * noise[0]
    inconsistency = 0.0014 * (1 - 0.4 * gain * min(1.0, 4 * weight)) * np.exp(0.05 * noise[1])
    score = recall - inconsistency**0.5
    return {
        "best/recall@1": recall,
        "best/opis": inconsistency,
        "best/score": score,
        "best/opis_noise_floor": 0.0005,
        "best/mean_utility": 0.97,
    }


def _finals(outcomes: Sequence[Outcome], objective: Objective, seeds: int) -> finals.Finals:
    chosen = finals.finalists(outcomes, 3, objective.tolerance, objective.mode)
    runs = []
    for point in finals.points(chosen, range(1, seeds + 1)):
        number, seed = int(str(point["number"])), int(str(point["train.seed"]))
        varied = {name: value for name, value in point.items() if name != "number"}
        runs.append(Outcome(number, "finished", varied, _figures(1000 * seed + number, varied), checkpoint="there"))
    return finals.judge(runs, objective.tolerance, objective.mode)


def curves(spread: float, classes: int) -> ThresholdCurves:
    """Of embeddings whose classes are as wide as they are uneven."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(classes), 8)
    width = spread * rng.uniform(0.5, 1.1, classes)
    centres = rng.normal(size=(classes, 16))
    return threshold_curves(centres[labels] + width[labels, None] * rng.normal(size=(len(labels), 16)), labels)


def _tested(spread: float, classes: int) -> Tested:
    lines = curves(spread, classes)
    metrics = {"recall@1": 0.96 - 0.04 * spread, "opis": opis(lines), "opis_noise_floor": noise_floor(lines)}
    metrics |= {"mean_utility": mean_utility(lines), "score": metrics["recall@1"] - metrics["opis"] ** 0.5}
    return Tested({f"test/{name}": value for name, value in metrics.items()}, lines, classes, ())
