"""The options of `python -m tune.search`, and what is recorded of them."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from cluster import registry
from dml.config import Config
from tune import storage
from tune.early_stopping import EarlyStop
from tune.objective import Objective
from tune.promote import When
from tune.sampler import SamplerName
from tune.space import Space


@dataclass(frozen=True)
class Options:
    """Searches TCM's margins, weight and start for the encoder whose single threshold holds best.

    Trial 0 is the baseline without TCM. The winner is the best score (--objective.mode has other rules) among trials
    whose Recall@1 is at least the baseline's minus the tolerance; it is registered in MLflow, and onethreshold@champion
    when it beats the champion before.
    Every setting of the recipe can be changed by its name, e.g. --loss.name proxy_anchor --optim.lr 3e-4.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    objective: Objective = field(default_factory=Objective)
    space: tuple[str, ...] = ()
    """Further settings to search, or other ranges of TCM's: name=range with uniform(low,high), log(low,high),
    int(low,high) or [a,b,c], e.g. --space 'optim.lr=log(1e-5,1e-3)' 'encoder.dim=[128,512]'."""
    trials: int = 8
    """Trials to run, the baseline included."""
    sampler: SamplerName = "tpe"
    """How Optuna chooses points: tpe, gp, nsga2, random or grid."""
    grid_points: int = 3
    """--sampler grid only: values of each range."""
    early_stop: EarlyStop = "asha"
    """Stops trials whose score falls behind: asha or median. The baseline is never stopped, nor is any trial with fewer
    than 8 evaluations."""
    seeds: int = 0
    """Trains the finalists and the baseline again over so many new seeds and chooses by the mean; 0 trusts one seed."""
    finalists: int = 3
    """--seeds only: how many of the best trials are finalists, beside the baseline."""
    retrain: float = 0.0
    """Trains the winner and the baseline once more, on train and this share of the val classes (such as 0.75); the
    others set the thresholds. 0 takes the models of the search."""
    promote: When = "better"
    """Moves the alias champion to the winner if it beats the present champion on val classes of the same split that
    neither was trained on, always or never; registered it is in any case."""
    model_name: str = registry.NAME
    """Registered model in MLflow that the winner becomes a version of."""
    workers_per_trial: int = 1
    """Ranks that train each trial together by DDP."""
    cpus_per_worker: float | None = None
    """CPUs of each rank; unless given, its GPU's share of the node's, or 1 without GPUs."""
    gpus_per_worker: float | None = None
    """GPUs of each rank, may be a fraction; 1 when the cluster has GPUs, else 0."""
    trials_at_once: int | None = None
    """Trials side by side; unless given, as many as the cluster holds when the search begins."""
    wait_for_resources: float = 0.0
    """Seconds to wait for an autoscaler to bring nodes that hold a trial; 0 refuses at once."""
    name: str = ""
    """Names the search; a time stamp is added when unset."""
    resume: str = ""
    """Name of a search that was interrupted and goes on, with its own settings; --trials may be more, and what trials
    take of the cluster another."""
    go_on: bool = False
    """With --name: goes on with the search of this name if it was begun, begins it if not, and has nothing to do if it
    has ended. The command of a job that is tried again."""
    give_up_after: int = 3
    """Stops the search when so many of its first trials have all failed; 0 goes on whatever fails."""
    storage: str = ""
    """Where checkpoints and the search's state go: a path that every node sees, or a URI. Default: runs/ray."""
    optuna_storage: str = ""
    """URL of the database of Optuna's study, e.g. postgresql://user@host/database. Default: the environment's
    ONETHRESHOLD_OPTUNA_STORAGE, where a password is safer than in a command, else SQLite at runs/optuna.db."""
    seed: int = 0
    """Seed of Optuna's sampler."""


def check_options(options: Options) -> None:
    """Refuses what can never be searched.

    Raises:
        ValueError: the option, its value and what would be valid.
    """
    for name, value, least in (
        ("trials", options.trials, 1),
        ("seeds", options.seeds, 0),
        ("finalists", options.finalists, 1),
        ("give-up-after", options.give_up_after, 0),
        ("grid-points", options.grid_points, 1),
        ("trials-at-once", options.trials_at_once, 1),
        ("wait-for-resources", options.wait_for_resources, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}: {value:g} is too few; at least {least}")
    registry.check_name(options.model_name)
    if not 0 <= options.retrain < 1:
        raise ValueError(f"retrain: {options.retrain:g} is no share of the val classes; valid: 0 to below 1")


def shown_command(words: Sequence[str], options: Options) -> str:
    """The command line's words, without a password, as a shell takes them."""
    return shlex.join(_without_secrets(word, options) for word in words)


def _without_secrets(word: str, options: Options) -> str:
    given = options.optuna_storage
    return word.replace(given, storage.shown(given)) if given and given in word else word


def run_params(options: Options, config: Config, space: Space, url: str) -> dict[str, object]:
    """What the search's run in MLflow has for parameters."""
    objective = {f"objective.{name}": value for name, value in options.objective.model_dump().items()}
    return {**config.flat, **objective, **own_options(options, url), "space": str(space)}


def own_options(options: Options, url: str) -> dict[str, object]:
    """The options of the search itself that say what it did, without a password."""
    names = (
        *("trials", "sampler", "grid_points", "early_stop", "seeds", "finalists", "workers_per_trial", "seed"),
        *("retrain", "promote", "model_name"),
    )
    return {**{name: getattr(options, name) for name in names}, "optuna_storage": storage.shown(url)}
