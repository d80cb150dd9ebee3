"""Which points of the space a search tries: Optuna's samplers by name."""

from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

SamplerName: TypeAlias = Literal["tpe", "gp", "nsga2", "random", "grid"]

FLAT: tuple[SamplerName, ...] = ("gp", "nsga2")
"""Those that model only parameters which every trial has (`Space.flat`)."""


def build(name: SamplerName, *, seed: int, trials: int, search_off: bool = False) -> "BaseSampler":
    """The sampler of this name. They read the constraint of a trial, where they can, from Optuna's storage.

    tpe: multivariate, by groups of conditional parameters (Bergstra et al., NeurIPS 2011; Falkner et al., ICML 2018).
    gp: a Gaussian process with the expected improvement. nsga2: a genetic algorithm (Deb et al., IEEE Trans. Evol.
    Comput. 2002) with a quarter of the trials a generation. random. grid: its points are enqueued (`Space.grid`), so
    that nothing is left to sample.

    Args:
        name: one of tpe, gp, nsga2, random, grid.
        seed: of its draws.
        trials: that the search will run; a quarter of them, at least 4, are drawn before a model is used.
        search_off: whether TCM off is sampled too. Where nothing beside TCM is searched, another trial without it
            would repeat the baseline.
    """
    import warnings

    import optuna

    samplers = optuna.samplers
    startup = max(4, trials // 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        found: BaseSampler
        if name == "tpe":
            found = samplers.TPESampler(
                seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=startup
            )
        elif name == "gp":
            found = samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        elif name == "nsga2":
            found = samplers.NSGAIISampler(seed=seed, population_size=startup)
        else:
            found = samplers.RandomSampler(seed=seed)
        return found if search_off else samplers.PartialFixedSampler({"tcm": "on"}, found)
