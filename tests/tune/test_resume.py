"""What dies is lost for seconds: drivers, workers and the head of a cluster, with real processes and real signals.

However a search is interrupted, `--resume NAME` ends it as if nothing had been: each trial once, none left RUNNING.
"""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from ray.cluster_utils import Cluster

from tests.drivers import end, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS = 8
WORDS = ["--recipe", "digits", "--train.epochs", str(EPOCHS), "--early-stop", "none", "--name", "autumn"]


def read_until(driver: subprocess.Popen[str], what: str) -> str:
    """What it said up to the first line that matches."""
    assert driver.stdout is not None
    said = []
    for line in driver.stdout:
        said.append(line)
        if re.search(what, line):
            return "".join(said)
    raise AssertionError("".join(said))


def runs(here: Path) -> list[Run]:
    """MLflow's runs: the search and its trials."""
    client = MlflowClient(f"sqlite:///{here / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("onethreshold")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def losses(here: Path, run: Run) -> list[int]:
    """Epochs whose score MLflow has of a run."""
    client = MlflowClient(f"sqlite:///{here / 'runs' / 'mlflow.db'}")
    return [point.step for point in client.get_metric_history(run.info.run_id, "val/score")]


def assert_whole(here: Path, trials: int) -> None:
    """The study and MLflow as an uninterrupted search leaves them."""
    found = optuna.load_study(study_name="autumn", storage=f"sqlite:///{here / 'runs' / 'optuna.db'}").trials
    assert [trial.state.name for trial in found] == ["COMPLETE"] * trials
    assert [sorted(trial.intermediate_values) for trial in found] == [list(range(1, EPOCHS + 1))] * trials
    ended = runs(here)
    assert [run.info.status for run in ended] == ["FINISHED"] * (trials + 1), "a parent and its trials, none twice"
    for run in ended:
        if run.data.tags["kind"] == "trial":
            steps = losses(here, run)
            assert steps == sorted(set(steps)), "no epoch twice"
            assert len(steps) == EPOCHS, "and none missing"
    folders = (here / "runs" / "ray" / "autumn").glob("trial-*")
    assert [len(list(folder.glob("step-*"))) for folder in folders] == [1] * trials, "the best checkpoint of each"


def times_begun(said: str) -> dict[int, int]:
    """How often each trial's first epoch was trained."""
    found = [int(number) for number in re.findall(r"trial (\d+): epoch 1/", said)]
    return {number: found.count(number) for number in found}


def test_a_terminated_driver_says_how_to_go_on(tmp_path: Path) -> None:
    """As `ray job stop` and Kubernetes do; it is told on as Ctrl-C."""
    driver = start(tmp_path, "tune.search", *WORDS, "--trials", "4")
    read_until(driver, r"trial [01]: epoch 2/8")
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGTERM)
    rest, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130
    assert "0 of 4 trials are done and kept" in rest
    assert "python -m tune.search --resume autumn" in rest
    assert "RUNNING" not in [run.info.status for run in runs(tmp_path)]
    _, alive = psutil.wait_procs(family, timeout=120)
    assert alive == [], "no orphan process"


def test_a_killed_driver_goes_on_by_name(tmp_path: Path) -> None:
    driver = start(tmp_path, "tune.search", *WORDS, "--trials", "4")
    first = read_until(driver, r"trial [23]: epoch 3/8")
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    rest, _ = driver.communicate(timeout=120)

    again = end(start(tmp_path, "tune.search", "--resume", "autumn"))
    assert "autumn goes on: 2 of 4 trials are done" in again
    assert times_begun(first + rest + again) == {0: 1, 1: 1, 2: 1, 3: 1}, "running trials went on where they were"
    assert re.search(r"trial [23]: goes on after epoch \d/8", again)
    assert "alias champion" in again
    assert_whole(tmp_path, 4)

    over = start(tmp_path, "tune.search", "--resume", "autumn")
    said, _ = over.communicate(timeout=100)
    assert (over.returncode, said) == (
        2,
        "error: resume: autumn has ended, with 4 trials; --trials can make it more\n",
    )
    # Ray's own agents look for their parent now and then only, so this comes last.
    _, alive = psutil.wait_procs(family, timeout=120)
    assert alive == [], "no orphan process"


def test_a_killed_worker_goes_on_in_the_same_command(tmp_path: Path) -> None:
    driver = start(tmp_path, "tune.search", *WORDS, "--trials", "2")
    first = read_until(driver, r"trial \d: epoch 3/8")
    family = psutil.Process(driver.pid).children(recursive=True)
    victims = [process for process in family if process.name().startswith("ray::")]
    victims = [process for process in victims if "Implicit" in process.name() or "run" in process.name()]
    assert victims, [process.name() for process in family]
    victims[0].kill()
    said = first + end(driver)
    assert "lost, and goes on from its newest checkpoint: The actor" in said
    assert times_begun(said) == {0: 1, 1: 1}
    assert_whole(tmp_path, 2)


@pytest.fixture
def head() -> Iterator[Callable[[], Cluster]]:
    """Starts clusters of one node; what the last leaves is stopped."""
    clusters: list[Cluster] = []

    def begin() -> Cluster:
        clusters.append(Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}))
        return clusters[-1]

    yield begin
    clusters[-1].shutdown()


def test_the_loss_of_the_head_is_made_up_for_by_another(tmp_path: Path, head: Callable[[], Cluster]) -> None:
    first = head()
    driver = start(tmp_path, "tune.search", *WORDS, "--trials", "3", address=first.address)
    said = read_until(driver, r"trial 2: epoch 2/8")
    processes = [process.process for kind in first.head_node.all_processes.values() for process in kind]
    family = [psutil.Process(process.pid) for process in processes if process.poll() is None]
    family += [child for process in family for child in process.children(recursive=True)]
    for process in {process.pid: process for process in family}.values():
        process.kill()
    time.sleep(1.0)
    driver.kill()  # it would look for its head for a minute
    driver.communicate(timeout=60)

    again = end(start(tmp_path, "tune.search", "--resume", "autumn", address=head().address))
    assert times_begun(said + again) == {0: 1, 1: 1, 2: 1}
    assert_whole(tmp_path, 3)
