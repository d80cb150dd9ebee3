"""Room for trials: what fits, what is said when nothing does, and waiting for more."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.session import Resources
from tune import resources


def fits(node: dict[str, float], cpus: float, gpus: float = 0.0) -> int:
    return resources.places_on(node, Resources(1, cpus, gpus).per_worker)


def test_places_are_counted_node_by_node_and_gpu_by_gpu() -> None:
    assert fits({"CPU": 8}, 1) == 8
    assert fits({"CPU": 8}, 3) == 2
    assert fits({"CPU": 2}, 0.1) == 20, "not 19 by rounding"
    assert fits({"CPU": 8, "GPU": 2}, 1, 1) == 2
    assert fits({"CPU": 8, "GPU": 2}, 1, 0.4) == 4, "two shares of each GPU; no worker lies on two"
    assert fits({"CPU": 3, "GPU": 2}, 1, 0.25) == 3, "the CPUs run out first"
    assert fits({"CPU": 8}, 1, 1) == 0
    assert fits({"CPU": 8, "GPU": 8}, 1, 4) == 2


def test_trials_at_once_follow_from_the_cluster(ray_local: None) -> None:
    assert resources.trials_at_once(Resources(1, 1.0)) == 2
    assert resources.trials_at_once(Resources(2, 1.0)) == 1
    assert resources.trials_at_once(Resources(2, 0.5)) == 2


def test_what_fits_nowhere_is_refused_in_words(ray_local: None) -> None:
    with pytest.raises(ValueError, match=r"a trial of 1 worker with 3 CPU fits nowhere: 1 node \(2 CPU, 0 GPU\)"):
        resources.trials_at_once(Resources(1, 3.0))
    with pytest.raises(ValueError, match="workers: 0 is too few"):
        resources.claim(0, None, None)
    assert resources.claim(2, None, None) == Resources(2, 1.0, 0.0)


def test_waiting_ends_with_the_reason(ray_local: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TimeoutError, match=r"after 0.2 s a trial of 3 workers with 1 CPU fits nowhere: 1 node"):
        resources.claim(3, None, None, wait=0.2)
    assert "waiting up to 0.2 s for nodes that hold a trial of 3 workers with 1 CPU" in capsys.readouterr().out


def test_a_search_that_waits_says_so(ray_local: None, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = resources.Waiting(Resources(1, 1.0), quiet=0.05)
    pending: list[Any] = [SimpleNamespace(status="PENDING")]
    running: list[Any] = [SimpleNamespace(status="RUNNING"), *pending]
    for trials, wait, said in ((pending, 0.1, 0), (pending, 0.1, 1), (running, 0.1, 0), (pending, 0.1, 0), ([], 0, 0)):
        waiting.on_step_begin(0, trials)
        time.sleep(wait)
        lines = capsys.readouterr().out
        assert lines.count("waiting: no trial has run for 0.05 s. One needs 1 worker with 1 CPU") == said


LATER = """
import concurrent.futures, time, ray
from ray.cluster_utils import Cluster
from cluster.session import Resources
from tune import resources

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
ray.init(address=cluster.address, log_to_driver=False)
with concurrent.futures.ThreadPoolExecutor() as pool:
    claimed = pool.submit(resources.claim, 1, 2.0, None, wait=100)
    time.sleep(3)
    assert not claimed.done()
    cluster.add_node(num_cpus=2)
    assert claimed.result() == Resources(1, 2.0, 0.0)
assert resources.trials_at_once(Resources(1, 1.0)) == 3
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_that_comes_later_is_waited_for(tmp_path: Path) -> None:
    """A cluster of its own, in a process of its own, whose second node joins while the search waits."""
    done = subprocess.run(
        [sys.executable, "-c", LATER], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting up to 100 s for nodes that hold a trial of 1 worker with 2 CPU" in done.stdout
