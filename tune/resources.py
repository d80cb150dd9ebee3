"""Room for trials: how many fit at once, waiting for an autoscaler, and saying so when nothing fits."""

import math
import time
from collections.abc import Sequence
from typing import Any

import ray
import ray.tune
from ray._raylet import PlacementGroupID
from ray.tune.experiment import Trial
from ray.util.placement_group import PlacementGroup, remove_placement_group

from cluster import nodes, session
from cluster.session import Resources
from cluster.train import PLACEMENT_GROUP
from tune.early_stopping import ENDED

QUIET = 60.0
"""Seconds without a running trial after which a search says that it waits, and how often it says so again."""
_POLL = 1.0
_GRACE = 5.0


def places(resources: Resources) -> int:
    """How many workers the living nodes hold at once: a worker lies on one node, and a share of a GPU on one GPU."""
    return sum(places_on(node, resources.per_worker) for node in nodes.resources())


def trials_at_once(resources: Resources) -> int:
    """How many trials fit together: more drivers than workers' places would only wait for each other.

    Raises:
        ValueError: not one fits; it says what a trial needs and what the nodes have.
    """
    fit = places(resources) // resources.workers
    if fit < 1:
        raise ValueError(
            f"a trial of {_needs(resources)} fits nowhere: {_has()}; take fewer, or wait for more nodes with "
            "--wait-for-resources SECONDS"
        )
    return fit


def claim(workers: int, cpus: float | None, gpus: float | None, *, wait: float = 0.0) -> Resources:
    """What a trial takes, of which at least one must fit into the cluster.

    Args:
        workers: ranks of a trial.
        cpus: of each rank; unless given its GPU's share of the node's, or 1 without GPUs.
        gpus: of each rank, may be a fraction; unless given 1 when the cluster has GPUs, else 0.
        wait: seconds to wait for an autoscaler, or a person, to bring nodes that hold one trial.

    Raises:
        ValueError: fewer than one worker, or no trial fits.
        TimeoutError: no trial fits after the wait.
    """
    if wait > 0 and workers > 0:
        each = gpus if gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        _wait(Resources(workers, cpus or session.cpus_beside(nodes.resources(), each), each), wait)
    resources = Resources.of(workers, cpus, gpus)
    trials_at_once(resources)
    return resources


def _wait(resources: Resources, seconds: float) -> None:
    from ray.autoscaler.sdk import request_resources

    if places(resources) >= resources.workers:
        return
    print(f"waiting up to {seconds:g} s for nodes that hold a trial of {_needs(resources)}; now: {_has()}", flush=True)
    bundle = {name: math.ceil(each) for name, each in resources.per_worker.items()}
    request_resources(bundles=[bundle] * resources.workers)
    deadline = time.monotonic() + seconds
    try:
        while places(resources) < resources.workers:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"--wait-for-resources: after {seconds:g} s a trial of {_needs(resources)} fits nowhere: {_has()}"
                )
            time.sleep(min(_POLL, left))
    finally:
        # From here on the requests of the trials themselves keep the nodes.
        request_resources(bundles=[])


class Waiting(ray.tune.Callback):
    """Says that a search waits, when no trial has run for a while: others may hold the cluster, or a node was lost.

    Args:
        resources: what a trial takes.
        quiet: seconds without a running trial before it is said.
    """

    def __init__(self, resources: Resources, quiet: float = QUIET) -> None:
        self.resources, self.quiet = resources, quiet
        self._since: float | None = None

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Looks at the trials."""
        waiting = any(trial.status == Trial.PENDING for trial in trials)
        if not waiting or any(trial.status == Trial.RUNNING for trial in trials):
            self._since = None
            return
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif now - self._since >= self.quiet:
            self._since = now
            print(
                f"waiting: no trial has run for {self.quiet:g} s. One needs {_needs(self.resources)}; "
                f"free: {_amounts(ray.available_resources())} of {_has()}",
                flush=True,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its callbacks; a clock of this process means nothing in the next."""
        return {**self.__dict__, "_since": None}


class Freeing(ray.tune.Callback):
    """Frees the workers of trials over several workers that were stopped early, or whose driver died.

    Such a trial has no time to end its Ray Train job, and the placement group of that outlives it: Ray Train's own
    cleaner finds out by way of a dashboard, which a local Ray lacks, and not where two Rays share a machine.
    """

    def __init__(self) -> None:
        self._left: dict[str, float] = {}

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Notes the workers of a trial that was stopped."""
        if not trial.last_result.get(ENDED):
            self.on_trial_error(iteration, trials, trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Notes the workers of a trial that failed."""
        group = trial.last_result.get(PLACEMENT_GROUP)
        if group is not None:
            self._left[group] = time.monotonic()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Notes the workers of a trial whose driver was lost: it takes others when it goes on."""
        self.on_trial_error(iteration, trials, trial)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Frees what was noted a while ago: Ray Train would replace workers that it loses before its driver is gone."""
        due = [group for group, since in self._left.items() if time.monotonic() - since >= _GRACE]
        self._free(due)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Frees the rest."""
        self._free(list(self._left))

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its callbacks; placement groups end with the search's connection to Ray."""
        return {"_left": {}}

    def _free(self, groups: Sequence[str]) -> None:
        for group in groups:
            del self._left[group]
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def places_on(node: dict[str, float], each: dict[str, float]) -> int:
    """How many workers a node holds.

    Args:
        node: Ray's resources of the node.
        each: what a worker takes of them.
    """
    fits: Sequence[float] = [
        _times(node.get(name, 0.0), need, split=name == "GPU") for name, need in each.items() if need
    ]
    return int(min(fits)) if fits else 0


def _times(has: float, need: float, *, split: bool) -> float:
    # Ray counts in ten-thousandths; a sum of shares must not miss the last place by rounding.
    if split and need < 1:
        return has * math.floor(1 / need + 1e-4)
    return math.floor(has / need + 1e-4)


def _needs(resources: Resources) -> str:
    each = " and ".join(f"{need:g} {name}" for name, need in resources.per_worker.items())
    return f"{resources.workers} {'worker' if resources.workers == 1 else 'workers'} with {each}"


def _has() -> str:
    alive = nodes.resources()
    found = ", ".join(_amounts(node) for node in alive)
    return f"{len(alive)} {'node' if len(alive) == 1 else 'nodes'} ({found})"


def _amounts(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"
