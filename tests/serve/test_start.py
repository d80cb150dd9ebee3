"""`python -m serve.app` in a cluster that has no room for all its replicas."""

import re
import signal
from pathlib import Path

import pytest

from serve.app import NAME
from tests.drivers import start
from tests.serve.pictures import write_checkpoint
from tests.serve.test_service import wait_for


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_what_it_waits_for_and_can_be_ended_while_it_waits(
    number: signal.Signals, ray_local: None, tmp_path: Path
) -> None:
    import ray
    import ray.serve

    folder = write_checkpoint(tmp_path / "mine", seed=0)
    address = ray.get_runtime_context().gcs_address
    words = ["--model", str(folder), "--replicas", "3"]
    process = start(tmp_path, "serve.app", *words, address=address)
    try:
        assert process.stdout is not None
        assert re.search(r"replicas: 3 with 1 CPU each; free now: \d CPU", process.stdout.readline())
        wait_for(lambda: NAME in ray.serve.status().applications or process.poll() is not None, seconds=120)
        process.send_signal(number)
        said, _ = process.communicate(timeout=120)
        assert (process.returncode, said) == (0, "stopping\n")
        assert ray.serve.status().applications == {}, "nothing of it stays in a cluster that others use"
    finally:
        process.kill()
        ray.serve.shutdown()
