"""The space that Optuna searches: TCM's margins, its weight and when it is switched on."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.samplers import BaseSampler

BASELINE: dict[str, str | float] = {"tcm": "off"}
FIRST_POINTS: list[dict[str, str | float]] = [
    BASELINE,
    # The paper's margins, at the weight that also works from scratch.
    {"tcm": "on", "tcm.margin_pos": 0.9, "tcm.margin_neg": 0.5, "tcm.weight": 0.1, "tcm.start": 0.0},
]


def suggest(trial: "Trial") -> dict[str, float]:
    """Optuna's define-by-run form of the space; the ranges keep margin_neg below margin_pos.

    The weight is searched on a log scale, and with a start: from scratch all similarities begin near 1, and TCM at full
    weight from the first step holds the encoder there.

    Returns:
        What is not sampled: the trial's number, and weight 0 for the baseline without TCM.
    """
    if trial.suggest_categorical("tcm", ["off", "on"]) == "off":
        return {"number": trial.number, "tcm.weight": 0.0}
    trial.suggest_float("tcm.margin_pos", 0.5, 0.95)
    trial.suggest_float("tcm.margin_neg", 0.0, 0.5)
    trial.suggest_float("tcm.weight", 0.01, 1.0, log=True)
    trial.suggest_float("tcm.start", 0.0, 0.6)
    return {"number": trial.number}


def sampler(seed: int, startup: int) -> "BaseSampler":
    """Multivariate TPE that samples only trials with TCM; the baseline is enqueued once and needs no repeat.

    Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011.

    Args:
        seed: of the sampler.
        startup: trials drawn at random before the model of the space is used.
    """
    import warnings

    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        tpe = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=startup
        )
        return optuna.samplers.PartialFixedSampler({"tcm": "on"}, tpe)
