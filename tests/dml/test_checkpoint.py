"""A checkpoint folder is whole or not there, tells what was altered, and holds nothing that could run code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dml import checkpoint, encoders, losses, optim
from dml.config import Config
from dml.memory import Memory
from dml.state import Progress, State

CONFIG = Config().replace(**{"data.image_size": 16, "encoder.dim": 8})
WHOLE = [
    "checkpoint.json",
    "checksums.json",
    "config.json",
    "encoder.safetensors",
    "loss.safetensors",
    "memory.safetensors",
    "optimizer.safetensors",
    "plan.safetensors",
    "progress.json",
    "training_encoder.safetensors",
]


def encoder(seed: int = 0) -> encoders.Encoder:
    torch.manual_seed(seed)
    return encoders.build(CONFIG.encoder, channels=1, image_size=16)


def state() -> State:
    """Of a training that uses everything there is."""
    model, loss, memory = encoder(1), losses.build("proxy_anchor", num_classes=3, dim=8), Memory(5, 8)
    optimizer = optim.build(model, loss, CONFIG.optim)
    model(torch.randn(3, 1, 16, 16)).sum().backward()
    optimizer.step()
    memory.add(torch.randn(3, 8), torch.arange(3), torch.arange(3))
    parts = {
        "encoder": encoder().state_dict(),
        "training_encoder": model.state_dict(),
        "loss": loss.state_dict(),
        "memory": memory.state_dict(),
        "optimizer": optim.state(optimizer, model, loss),
        "plan": {"plan": torch.arange(6).reshape(2, 3)},
    }
    # 0.1 + 0.2 has no short decimal: it must come back to the last bit.
    progress = Progress(step=7, losses=(0.1 + 0.2,), without_loss=1, best=-0.25, waited=2, ema_updates=7)
    return State(CONFIG, progress, parts)


def test_a_model_that_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = encoder()
    checkpoint.save(tmp_path / "best", saved, CONFIG, info={"epoch": 2})
    loaded = checkpoint.load(tmp_path / "best")
    images = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(loaded.encoder(images), saved.eval()(images), rtol=0, atol=0)
    assert loaded.config == CONFIG
    assert loaded.info == {"epoch": 2}
    with pytest.raises(checkpoint.CheckpointError, match=r"best is no checkpoint: progress[.]json missing"):
        checkpoint.load_state(tmp_path / "best")


def test_a_state_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    saved = state()
    checkpoint.save(tmp_path / "last", encoder(), CONFIG, info={"epoch": 2}, state=saved)
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == WHOLE
    loaded = checkpoint.load_state(tmp_path / "last")
    assert (loaded.config, loaded.progress, loaded.info) == (CONFIG, saved.progress, {"epoch": 2})
    assert loaded.parts.keys() == saved.parts.keys()
    for part, tensors in saved.parts.items():
        assert loaded.parts[part].keys() == tensors.keys()
        assert all(torch.equal(loaded.parts[part][name], value) for name, value in tensors.items()), part
    assert torch.equal(next(checkpoint.load(tmp_path / "last").encoder.parameters()), next(encoder().parameters()))


def test_a_parameter_that_has_not_been_trained_yet_has_no_moments(tmp_path: Path) -> None:
    saved = state()
    assert "encoder.projection.weight/exp_avg" in saved.parts["optimizer"]
    assert not any(name.startswith("loss.") for name in saved.parts["optimizer"]), "no gradient has reached the proxies"


def test_saving_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best", encoder(), CONFIG, info={"epoch": 1}, state=state())
    checkpoint.save(tmp_path / "best", encoder(), CONFIG, info={"epoch": 2})
    assert checkpoint.load(tmp_path / "best").info == {"epoch": 2}
    assert not (tmp_path / "best" / "loss.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["best"], "nothing half-written is left beside it"


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    broken = encoder()
    with torch.no_grad():
        broken.projection.weight[0, 0] = float("nan")
    with pytest.raises(checkpoint.CheckpointError, match=r"encoder weight projection.weight is not finite"):
        checkpoint.save(tmp_path / "best", broken, CONFIG, info={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_missing_truncated_or_altered_file_of_the_model_is_named(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path / "best", encoder(), CONFIG, info={})
    path = tmp_path / "best" / name
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(broken)
        with pytest.raises(checkpoint.CheckpointError, match=rf"{name.replace('.', '[.]')} is truncated or altered"):
            checkpoint.load(tmp_path / "best")
    path.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=rf"{name.replace('.', '[.]')} missing"):
        checkpoint.load(tmp_path / "best")


@pytest.mark.parametrize("name", WHOLE)
def test_a_missing_or_altered_file_of_the_state_is_named(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path / "last", encoder(), CONFIG, info={}, state=state())
    path = tmp_path / "last" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(checkpoint.CheckpointError, match=rf"{name.replace('.', '[.]')} is truncated or altered"):
        checkpoint.load_state(tmp_path / "last")
    path.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=rf"{name.replace('.', '[.]')} missing"):
        checkpoint.load_state(tmp_path / "last")


def test_a_model_without_its_training_and_one_from_before_checksums_load(tmp_path: Path) -> None:
    """The registry keeps a model's files alone; folders written by the first release have no checksums."""
    checkpoint.save(tmp_path / "last", encoder(), CONFIG, info={}, state=state())
    (tmp_path / "model").mkdir()
    for path in checkpoint.model_files(tmp_path / "last"):
        shutil.copy(path, tmp_path / "model")
    assert checkpoint.load(tmp_path / "model").config == CONFIG
    (tmp_path / "model" / "checksums.json").unlink()
    assert checkpoint.load(tmp_path / "model").config == CONFIG
    weights = tmp_path / "model" / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(checkpoint.CheckpointError, match="model is no usable checkpoint"):
        checkpoint.load(tmp_path / "model")


def test_weights_of_another_shape_and_unknown_settings_are_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best", encoder(), CONFIG, info={})
    (tmp_path / "best" / "checksums.json").unlink()
    config = tmp_path / "best" / "config.json"
    original = json.loads(config.read_text())
    config.write_text(json.dumps(original | {"encoder": original["encoder"] | {"dim": 9}}))
    with pytest.raises(checkpoint.CheckpointError, match=r"projection[.]weight"):
        checkpoint.load(tmp_path / "best")
    config.write_text(json.dumps(original | {"exec": "x"}))
    with pytest.raises(checkpoint.CheckpointError, match="exec"):
        checkpoint.load(tmp_path / "best")


def test_weights_are_stored_as_tensors_alone(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "last", encoder(), CONFIG, info={}, state=state())
    for path in (tmp_path / "last").glob("*.safetensors"):
        assert all(isinstance(value, torch.Tensor) for value in load_file(path).values())
    others = {path.suffix for path in (tmp_path / "last").iterdir()}
    assert others == {".json", ".safetensors"}
