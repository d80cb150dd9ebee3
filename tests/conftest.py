"""Fixtures that are shared by all tests: one MLflow store and one local Ray for the whole session."""

import logging
import os
from collections.abc import Generator, Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI (ONETHRESHOLD_FORBID_SKIPS) a test that would be skipped, since a program is absent, fails."""
    report = yield
    if report.skipped and os.environ.get("ONETHRESHOLD_FORBID_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which ONETHRESHOLD_FORBID_SKIPS forbids: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tracking URI of an SQLite store in a temporary folder; MLFLOW_TRACKING_URI names it for the session.

    Shared, since creating one takes seconds: give runs, models and experiments names of their own.
    """
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        import mlflow

        mlflow.set_tracking_uri(uri)
        # Named, since MLflow would put the artifacts of its default experiment into ./mlruns.
        mlflow.set_experiment(
            experiment_id=mlflow.create_experiment("tests", artifact_location=(folder / "artifacts").as_uri())
        )
        yield uri


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray with 2 CPUs, shared by the session and stopped with its processes at the end."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    yield
    ray.shutdown()
