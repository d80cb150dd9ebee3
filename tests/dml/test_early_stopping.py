"""Training ends when the score on val has not risen for some evaluations."""

import math

import pytest
import torch

from dml import evaluate, loop, recipes
from dml.data import datasets
from dml.early_stopping import EarlyStopping


@pytest.mark.parametrize(
    ("patience", "scores", "ends"),
    [
        (1, [0.5, 0.6, 0.6], [False, False, True]),
        (2, [0.5, 0.4, 0.6, 0.5, 0.6], [False, False, False, False, True]),
        (2, [math.nan, -0.1, math.nan, math.nan], [False, False, False, True]),
        (None, [0.5, 0.4, 0.3, 0.2], [False] * 4),
    ],
)
def test_it_ends_after_patience_evaluations_in_a_row_without_a_better_one(
    patience: int | None, scores: list[float], ends: list[bool]
) -> None:
    stopping = EarlyStopping(patience)
    assert [stopping.done(score) for score in scores] == ends


def test_no_patience_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="patience is at least 1 evaluation, got 0"):
        EarlyStopping(0)


@pytest.mark.parametrize(
    ("patience", "epochs"), [(1, [(1, False), (2, False), (3, True)]), (3, [(1, False), (2, False), (3, False)])]
)
def test_a_training_stops_and_its_last_report_says_so(
    monkeypatch: pytest.MonkeyPatch, patience: int, epochs: list[tuple[int, bool]]
) -> None:
    """The last epoch is the end anyway."""
    scores = iter([0.1, 0.2, 0.15, 0.15])
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: {"val/score": next(scores)})
    settings = {"train.epochs": 4 if patience == 1 else 3, "train.steps_per_epoch": 1, "train.patience": patience}
    config = recipes.digits("short").replace(**settings)
    found = loop.train(config, datasets.load(config.data), device=torch.device("cpu"))
    assert [(event.epoch, event.stopped) for event in found if isinstance(event, loop.EpochReport)] == epochs
