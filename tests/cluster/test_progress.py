"""What a person sees of a training: in a terminal, in a job's log, and when quiet."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import rich.console
import torch

from cluster import messages, progress
from cluster.progress import Poster, Progress
from cluster.tracking import Run
from dml import recipes
from dml.data.datasets import Splits
from dml.data.imageset import ImageSet, Memory
from dml.loop import StepReport

CONFIG = recipes.digits().replace(**{"train.epochs": 20, "train.patience": 3})
STEP = {"step": 30, "total": 460, "loss": 0.5, "left": 65.0}
EPOCH = {
    "step": 46,
    "total": 460,
    "left": 3725.2,
    "epoch": 2,
    "epochs": 20,
    "stopped": False,
    "metrics": {
        "train/loss": 0.43211,
        "val/recall@1": 0.98765,
        "val/opis": 0.001234,
        "train/images_per_second": 12345.6,
    },
}
LINE = "epoch  2/20  loss 0.4321  val Recall@1 0.9877  OPIS 0.00123  12,346 images/s  1:02:05 left"


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def shown(*found: dict, terminal: bool, quiet: bool = False) -> str:
    """What is written while these messages come."""
    file = io.StringIO()
    console = rich.console.Console(file=file, force_terminal=terminal, width=120, color_system=None)
    view = Progress(CONFIG, quiet=quiet, console=console)
    with view._bar:
        for message in found:
            view.show(message)
            view._bar.refresh()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


def test_without_a_terminal_there_is_one_plain_line_an_epoch() -> None:
    assert shown(STEP, EPOCH, STEP, terminal=False) == LINE + "\n"


def test_in_a_terminal_a_bar_moves_beneath_the_lines() -> None:
    said = shown(STEP, EPOCH, STEP | {"step": 69}, terminal=True)
    assert LINE in said
    bars = re.findall(r"(epoch \S+) [━╺╸ ]+ (step \S+)", said)
    assert ("epoch 2/20", "step 7/23") in bars
    assert ("epoch 3/20", "step 0/23") in bars, "the next one, once a line is printed"
    assert ("epoch 3/20", "step 23/23") in bars, "while it is evaluated"
    assert "loss 0.5000  1:05 left" in said


def test_the_end_before_the_last_epoch_is_explained() -> None:
    said = shown(EPOCH | {"stopped": True}, terminal=False)
    assert said.splitlines() == [
        LINE.removesuffix("  1:02:05 left"),
        "stopped early: no better val score in 3 evaluations",
    ]


def test_the_last_epoch_has_no_time_left() -> None:
    assert shown(EPOCH | {"step": 460, "left": 0.0}, terminal=False).endswith(" images/s\n")
    assert "finishing" in shown(EPOCH | {"step": 460, "left": 0.0}, terminal=True)


def test_quiet_shows_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (True, False):
        assert shown(STEP, EPOCH, {"warning": "a worker died"}, terminal=terminal, quiet=True) == ""
        assert capsys.readouterr().err == "warning: a worker died\n"


def test_records_that_wait_on_another_node_are_named_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that wait where the driver sees them are its own to send."""
    here = {"unsent": str(tmp_path), "host": "node-7"}
    shown(here, terminal=False)
    assert capsys.readouterr().err == ""
    shown(here | {"unsent": "/scratch/outbox/abc"}, terminal=False)
    said = capsys.readouterr().err
    assert "lies on node node-7 in /scratch/outbox/abc." in said
    assert said.endswith("python -m cluster.tracking flush --outbox /scratch/outbox\n")


@pytest.mark.parametrize("quiet", [True, False])
def test_the_end_says_what_came_of_it(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"best/epoch": 7, "best/recall@1": 0.98765, "best/opis": 0.001234, "epoch": 10}
    run = Run("http://me:secret@host:5000", "abc", "/outbox", 0)
    Progress(CONFIG, quiet=quiet).end(metrics, "/there", run, toy=True)
    said = capsys.readouterr().out
    best = "best epoch 7: val Recall@1 0.9877  OPIS 0.00123"
    if quiet:
        assert said == f"{best}  checkpoint /there\n"
    else:
        lines = ["", f"{best}  (toy: two val classes say little about OPIS)", "10 epochs, 0:00 in all"]
        assert said.splitlines() == [*lines, "checkpoint /there", "MLflow run abc in http://host:5000"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03"), (90061, "1 day 1:01:01")]
)
def test_a_duration_reads_as_a_clock(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def images(classes: int, each: int) -> ImageSet:
    labels = np.repeat(np.arange(classes), each)
    pixels = Memory(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8))
    return ImageSet(labels, tuple(map(str, range(classes))), pixels, np.arange(len(labels)))


@pytest.mark.parametrize(
    ("workers", "ranks"),
    [((1, 1), "1 rank"), ((2, 2), "2 ranks x 24"), ((5, 5), "5 ranks x 9 to 10"), ((1, 4), "1 to 4 ranks x 12 to 48")],
)
def test_what_follows_from_the_number_of_ranks_is_said(workers: tuple[int, int], ranks: str) -> None:
    splits = Splits(images(6, 200), images(2, 50), images(2, 50), set_aside=0, toy=True, fingerprint="")
    assert progress.setup(CONFIG, splits, workers) == [
        "1,200 training images of 6 classes, 100 val images of 2 others",
        f"global batch 48 = {ranks} (6 classes x 8 images); 25 steps an epoch, 20 epochs",
        "learning rate 0.001: that of the global batch, the same for any number of ranks",
    ]


def test_messages_reach_the_driver_once_and_in_order(ray_local: None) -> None:
    for number in range(12):
        messages.post("a", {"number": number})
        messages.post("b", {"number": -number})
    assert [message["number"] for message in messages.take("a")] == list(range(12))
    assert messages.take("a") == []
    assert len(messages.take("b")) == 12


def test_steps_that_follow_each_other_closely_are_one_message(ray_local: None) -> None:
    poster = Poster("steps", CONFIG)
    for step in range(10, 200, 10):
        poster(StepReport(step, {"train/loss": 1.0, "train/images_per_second": 96.0}, total=460))
    (first, *more) = messages.take("steps")
    assert first == {"loss": 1.0, "step": 10, "total": 460, "left": 225.0}
    assert len(more) < 18


def test_a_training_that_nobody_follows_leaves_no_messages(ray_local: None, caplog: pytest.LogCaptureFixture) -> None:
    Poster("", CONFIG)(StepReport(10, {"train/loss": 1.0, "train/images_per_second": 96.0}, total=460))
    messages.post("", {"warning": "ranks 1 were lost"})
    assert messages.take("") == []
    assert caplog.messages == ["ranks 1 were lost"]
