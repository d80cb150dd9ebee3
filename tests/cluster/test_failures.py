"""Lost workers are made up for as long as there is progress; the training's own errors are not tried again."""

import pickle

import pytest
import ray.train
import torch
from ray.exceptions import RayActorError

from cluster.failures import Retries, TrainingError, as_training_error
from dml.data.imageset import DataError
from dml.loop import NonFiniteLossError

GLOO = "[/build/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:7092."


@pytest.mark.parametrize(
    "error", [NonFiniteLossError("loss is nan at step 3"), DataError("a.png: not readable\nmore"), KeyError("x")]
)
def test_an_error_of_the_training_ends_it_at_once_with_rank_and_reason(error: Exception) -> None:
    told = as_training_error(1, error)
    assert isinstance(told, TrainingError)
    assert str(told).startswith(f"rank 1: {type(error).__name__}: ")
    assert "\n" not in str(told)
    travelled = pickle.loads(pickle.dumps(told))
    with pytest.raises(TrainingError, match=r"^rank 1: "):
        Retries().after_exception(None, {0: RuntimeError(GLOO), 1: travelled})


def test_what_the_loop_noted_is_told_and_what_helps_where_memory_is_short() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    caught.value.add_note("after 15 of 24 steps; last losses: 0.51, 0.49")
    said = str(as_training_error(0, caught.value))
    assert "DefaultCPUAllocator: can't allocate memory" in said
    assert said.endswith(
        "; a smaller train.micro_batch or batch needs less memory; after 15 of 24 steps; last losses: 0.51, 0.49"
    )


def test_a_rank_that_lost_another_is_retried_with_it() -> None:
    error = RuntimeError(GLOO)
    assert as_training_error(0, error) is error
    Retries().after_exception(None, {0: error})


def test_losses_of_workers_without_a_checkpoint_in_between_end_it() -> None:
    retries = Retries(limit=2)
    lost: dict[int, Exception] = {0: RuntimeError(GLOO), 1: RayActorError()}
    for _ in range(5):
        retries.after_exception(None, lost)
        retries.after_exception(None, lost)
        retries.after_report(None, [{}], ray.train.Checkpoint("/somewhere"))
    retries.after_exception(None, lost)
    retries.after_report(None, [{}], None)
    retries.after_exception(None, lost)
    with pytest.raises(TrainingError, match=r"ranks 0, 1 were lost, 3 times in a row .* Connection closed by peer"):
        retries.after_exception(None, lost)
