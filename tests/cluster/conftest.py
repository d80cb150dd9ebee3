"""A model for what does not mind whether it has learnt anything."""

from pathlib import Path

import pytest
import torch

from dml import checkpoint, encoders, recipes


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained encoder of the short digits recipe."""
    config = recipes.digits("short")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "untrained"
    encoder = encoders.build(config.encoder, channels=1, image_size=config.data.image_size)
    checkpoint.save(folder, encoder, config, info={"epoch": 0})
    return folder
