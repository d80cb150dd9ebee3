"""A checkpoint folder is whole or not there, and holds nothing that could run code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dml import checkpoint, encoders, losses
from dml.config import Config
from dml.memory import Memory

CONFIG = Config().replace(**{"data.image_size": 16, "encoder.dim": 8})


def encoder() -> encoders.Encoder:
    torch.manual_seed(0)
    return encoders.build(CONFIG.encoder, channels=1, image_size=16)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = encoder()
    loss = losses.build("proxy_anchor", num_classes=3, dim=8)
    checkpoint.save(tmp_path / "best", saved, CONFIG, info={"epoch": 2}, loss=loss)
    loaded = checkpoint.load(tmp_path / "best")
    images = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(loaded.encoder(images), saved.eval()(images), rtol=0, atol=0)
    assert loaded.config == CONFIG
    assert loaded.info == {"epoch": 2}
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "checkpoint.json",
        "config.json",
        "encoder.safetensors",
        "loss.safetensors",
    ]


def test_the_memory_is_stored_as_it_is(tmp_path: Path) -> None:
    memory, again = Memory(5, 8), Memory(5, 8)
    memory.add(torch.randn(3, 8), torch.arange(3), torch.arange(3))
    checkpoint.save(tmp_path / "best", encoder(), CONFIG, info={}, memory=memory)
    again.load_state_dict(load_file(tmp_path / "best" / "memory.safetensors"))
    assert int(again.written) == 3
    assert torch.equal(again.embeddings, memory.embeddings)


def test_saving_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    loss = losses.build("proxy_anchor", num_classes=3, dim=8)
    checkpoint.save(tmp_path / "best", encoder(), CONFIG, info={"epoch": 1}, loss=loss)
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
def test_a_missing_or_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path / "best", encoder(), CONFIG, info={})
    path = tmp_path / "best" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(checkpoint.CheckpointError, match="no usable checkpoint"):
        checkpoint.load(tmp_path / "best")
    path.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=rf"{name.replace('.', '[.]')} missing"):
        checkpoint.load(tmp_path / "best")


def test_weights_of_another_shape_and_unknown_settings_are_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best", encoder(), CONFIG, info={})
    config = tmp_path / "best" / "config.json"
    original = json.loads(config.read_text())
    config.write_text(json.dumps(original | {"encoder": original["encoder"] | {"dim": 9}}))
    with pytest.raises(checkpoint.CheckpointError, match=r"projection[.]weight"):
        checkpoint.load(tmp_path / "best")
    config.write_text(json.dumps(original | {"exec": "x"}))
    with pytest.raises(checkpoint.CheckpointError, match="exec"):
        checkpoint.load(tmp_path / "best")
