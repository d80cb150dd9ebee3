"""What becomes of a training whose workers fail: those that were lost are started anew, errors of its own end it."""

import ray.train
import torch

from cluster import messages
from dml import gather


class TrainingError(RuntimeError):
    """A training that cannot go on; one line with a rank and its error."""


def as_training_error(rank: int, error: Exception) -> Exception:
    """The error of a worker as Ray Train is to see it.

    Args:
        rank: of the worker.
        error: what its training raised.

    Returns:
        The error itself where another rank is gone, which is no fault of this one; else a TrainingError, which no
        retry would help.
    """
    if gather.lost_peer(error):
        return error
    reason = str(error).strip().splitlines()
    words = [f"rank {rank}: {type(error).__name__}: {reason[0] if reason else 'no message'}"]
    # Where a CPU's memory is short, torch raises a bare RuntimeError.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        words.append("a smaller train.micro_batch or batch needs less memory")
    return TrainingError("; ".join([*words, *getattr(error, "__notes__", [])]))


class Retries(ray.train.UserCallback):
    """Ends a training in Ray Train's controller where it would be retried in vain.

    Ray Train starts failed workers anew whatever failed. What a callback raises ends the training instead: that is how
    an error of the training itself is told from workers that died (killed, out of memory, their node gone), after whom
    it goes on from the last checkpoint, as often as that takes, as long as there is progress.

    Args:
        limit: losses of workers in a row, without a checkpoint in between, that are made up for.
        run_id: MLflow run, whose driver is told of each loss that is made up for; empty tells nobody.
    """

    def __init__(self, limit: int = 3, *, run_id: str = "") -> None:
        self.limit, self.in_a_row, self._run_id = limit, 0, run_id

    def after_report(
        self,
        run_context: object,
        metrics: list[dict[str, float | str]],
        checkpoint: ray.train.Checkpoint | None,
    ) -> None:
        """Progress: the count begins anew."""
        if checkpoint is not None:
            self.in_a_row = 0

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Called once for each failure of one or more workers.

        Raises:
            TrainingError: a retry cannot help, or has not helped.
        """
        for _, error in sorted(worker_exceptions.items()):
            if isinstance(error, TrainingError):
                raise error
        self.in_a_row += 1
        ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
        reason = _last_line(worker_exceptions[min(worker_exceptions)])
        if self.in_a_row > self.limit:
            raise TrainingError(
                f"ranks {ranks} were lost, {self.in_a_row} times in a row without a checkpoint in between: {reason}"
            )
        lost = f"ranks {ranks} were lost ({reason}); the training goes on from its newest checkpoint"
        messages.post(self._run_id, {"warning": lost})


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
