"""Which of the searched parameters the figures of a search hang on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tune import storage

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FIGURES = {"score": "score", "recall@1": "Recall@1", "opis": "OPIS"}
"""Optuna's user attributes of a trial that importance is asked of, and what they are called."""
LEAST = 4
"""Trials below which no forest is grown."""


def importances(name: str, url: str) -> dict[str, dict[str, float]]:
    """`shares` of the study of this name.

    Args:
        name: of the study.
        url: of `tune.storage.url`.
    """
    import optuna

    return shares(optuna.load_study(study_name=name, storage=storage.connect(url)))


def shares(study: "Study", *, seed: int = 0) -> dict[str, dict[str, float]]:
    """The share of each parameter in the variance of Recall@1, OPIS and score, by functional ANOVA over a forest.

    Hutter, Hoos and Leyton-Brown, "An Efficient Approach for Assessing Hyperparameter Importance", ICML 2014. Among the
    finished trials with TCM on, since its parameters do not exist where it is off.

    Args:
        study: with the user attributes of `tune.optuna_search.ATTRIBUTES`.
        seed: of the forest.

    Returns:
        By figure and by Optuna's name of the parameter, each figure's shares summing to 1. A figure is left out that
        did not vary, and everything with fewer than LEAST trials, no more of them than parameters, or no parameter
        that varied.
    """
    import optuna
    from optuna.trial import TrialState

    trials = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.params.get("tcm") != "off" and FIGURES.keys() <= trial.user_attrs.keys()
    ]
    names = sorted({name for trial in trials for name in trial.params})
    varied = [
        name
        for name in names
        if all(name in trial.params for trial in trials) and len({trial.params[name] for trial in trials}) > 1
    ]
    if len(trials) < LEAST or not 0 < len(varied) < len(trials):
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    copy = optuna.create_study(directions=study.directions)
    copy.add_trials(trials)
    found: dict[str, dict[str, float]] = {}
    for attribute, figure in FIGURES.items():
        if len({trial.user_attrs[attribute] for trial in trials}) > 1:
            found[figure] = _of(copy, attribute, varied, seed)
    return found


def _of(study: "Study", attribute: str, varied: list[str], seed: int) -> dict[str, float]:
    import optuna

    def figure(trial: "FrozenTrial") -> float:
        return float(trial.user_attrs[attribute])

    # Optuna's own 64 trees of depth 64 take half a minute a figure at 1,000 trials, for the same shares.
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=32, max_depth=8, seed=seed)
    found: Mapping[str, float] = optuna.importance.get_param_importances(
        study, evaluator=evaluator, params=varied, target=figure
    )
    return dict(found)
