"""Mistakes on the command line: one line, exit status 2, and no Ray started."""

from pathlib import Path

import pytest
import ray
from mlflow.exceptions import MlflowException

from cluster import command_line, train
from cluster.outbox import OutboxInUse
from dml import recipes
from tune import search


def stopped(capsys: pytest.CaptureFixture[str], words: list[str], main: object = train.main) -> str:
    """What the command says on stderr before it exits with status 2."""
    before = ray.is_initialized()
    with pytest.raises(SystemExit) as stop:
        main(words)  # type: ignore[operator]
    assert stop.value.code == 2
    assert ray.is_initialized() == before
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, "one line"
    return error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "glyph"], "unknown recipe 'glyph'; valid: glyphs, digits, image_folder"),
        (["--recipe"], "--recipe needs a value"),
        (["--resume", ""], "--resume needs a value"),
        (["--resume="], "--resume needs a value"),
        (["--budget", "huge"], "unknown budget 'huge'; valid: short, full"),
        (["--optim.lrr", "1"], "unknown option '--optim.lrr'; valid: --optim.lr, "),
        (["--loss.name", "multi_similarty"], "unknown loss 'multi_similarty'; valid: multi_similarity, "),
        (["--loss.options", "alfa", "2"], "unknown option of loss multi_similarity 'alfa'; valid: alpha, "),
        (["--encoder.name", "resnet5O"], "unknown encoder 'resnet5O'; valid: resnet50"),
        (["--data.dataset", "digit"], "unknown dataset 'digit'; valid: digits, "),
        (["--optim.lr", "-1"], "optim.lr: Input should be greater than 0 (got -1.0)"),
        (["--optim.lr", "fast"], "--optim.lr"),
        (["--optim.clip", "inf"], "optim.clip: Input should be a finite number (got inf)"),
        (["--loss.options", "alpha", "nan"], "loss.options.alpha: Input should be a finite number (got nan)"),
        (["--tcm.margin-pos", "0.2"], "margin_neg (0.5) must not exceed margin_pos (0.2)"),
        (["--loss.name", "arcface", "--memory.size", "9"], "error: memory.size is 9, but loss arcface takes none"),
        (
            ["--loss.name", "torch.nn:Softmin", "--memory.size", "9"],
            "but loss torch.nn:Softmin takes none",
        ),
        (["--encoder.weights", "absent.pth"], "absent.pth is not a file"),
        (["--recipe", "digits", "--workers", "two"], "workers: 'two' is neither a number, such as 2, nor MIN:MAX"),
        (
            ["--recipe", "digits", "--workers", "1:49"],
            "49 workers cannot share a batch of 48 images",
        ),
        (["--loss.name", "triplet", "--batch.samples", "1"], "error: batch.samples is 1, but loss triplet needs"),
        (["--loss.name", "torch.nn:Nothing"], "unknown class of torch.nn 'Nothing'"),
        (["--loss.name", "os:path"], "os:path is no class of torch.nn.Module"),
        (["--recipe", "image_folder"], "data.root"),
        (["--recipe", "digits", "--batch.classes", "7"], "7"),
        (["--recipe", "digits", "--batch.samples", "5000"], "5000"),
        (["--recipe", "digits", "--evaluate.far-min", "1e-9"], "the smallest FAR they resolve is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_named_in_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in stopped(capsys, words)


def test_the_search_refuses_alike(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "unknown option '--trial'; valid: --trials, " in stopped(capsys, ["--trial", "3"], search.main)
    said = stopped(capsys, ["--objective.weight", "-1"], search.main)
    assert "objective.weight: Input should be greater than or equal to 0 (got -1.0)" in said
    assert "unknown option '--objective.mod'; valid: --objective.mode, " in stopped(
        capsys, ["--objective.mod", "pareto"], search.main
    )
    words = ["--recipe", "digits", "--workers-per-trial", "49"]
    assert "49 workers cannot share a batch of 48 images" in stopped(capsys, words, search.main)
    words = ["--recipe", "image_folder", "--data.root", str(tmp_path / "none")]
    assert str(tmp_path / "none") in stopped(capsys, words, search.main)


def test_an_error_of_the_system_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, why in ((tmp_path / "file" / "x", "Not a directory"), (tmp_path / "file", "File exists")):
        with pytest.raises(SystemExit), command_line.one_line_errors():
            folder.mkdir()
        assert capsys.readouterr().err == f"error: {folder}: {why}\n"
    with pytest.raises(SystemExit), command_line.one_line_errors():
        Path("/proc/self/mem").read_bytes()
    assert capsys.readouterr().err == "error: Input/output error\n"
    with pytest.raises(SystemExit), command_line.one_line_errors():
        raise FileNotFoundError("no such table")
    assert capsys.readouterr().err == "error: no such table\n"


def test_settings_are_changed_by_name() -> None:
    options = command_line.parse(
        train.Options, ["--recipe", "digits", "--optim.lr=0.5", "--workers", "3", "--loss.options", "alpha", "3"]
    )
    assert options.config.data.dataset == "digits"
    assert options.config.optim.lr == 0.5
    assert options.config.loss.options == {"alpha": 3.0}
    assert options.workers == "3"


def test_a_run_goes_on_where_the_weights_that_it_began_with_are_gone() -> None:
    config = recipes.digits().replace(**{"encoder.weights": "/absent.pth"})
    assert command_line.goes_on(train.Options(config), [], "run").config == config


def test_switches_can_be_turned_off() -> None:
    words = ["--recipe", "image_folder", "--encoder.no-pretrained", "--no-figures"]
    options = command_line.parse(train.Options, words)
    assert options.config.encoder.pretrained is False
    assert options.figures is False


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        search.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("--recipe", "glyphs", "--budget", "--trials", "--tcm.margin-pos", "Trial 0 is the baseline"):
        assert word in text


def test_in_a_job_no_training_is_left_where_ray_throws_it_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    error = stopped(capsys, ["--recipe", "digits"])
    assert "--storage with a URI or an absolute path" in error
    assert "MLFLOW_TRACKING_URI in the job's environment" in error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MlflowException("https://me:p@ss@host/api: [Errno 111] Connection refused"), "MLflow: does not answer ("),
        (MlflowException("INVALID: https://me:p@ss@host/api"), "MLflow: INVALID: https://host/api"),
        (OutboxInUse("runs/outbox/1 is in use by a run that is alive"), "runs/outbox/1 is in use"),
    ],
)
def test_what_mlflow_raises_is_one_line_without_a_password(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), command_line.one_line_errors():
        raise error
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}")
    assert "ss@" not in said
