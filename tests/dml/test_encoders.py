"""Encoders: unit embeddings from any timm backbone, and weights without pickle."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from dml import encoders
from dml.config import EncoderConfig


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        ("small_cnn", 1, 32),
        ("small_cnn", 3, 16),
        ("resnet10t", 1, 64),
        ("vit_tiny_patch16_224", 3, 64),
        ("mobilenetv3_small_050", 3, 64),
    ],
)
def test_embeddings_are_float32_of_unit_norm(name: str, channels: int, size: int) -> None:
    encoder = encoders.build(EncoderConfig(name=name, dim=12), channels=channels, image_size=size).eval()
    embeddings = encoder(torch.randn(2, channels, size, size))
    assert embeddings.shape == (2, 12)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_the_small_encoder_embeds_an_image_alike_alone_and_in_company() -> None:
    encoder = encoders.build(EncoderConfig(), channels=1, image_size=32).train()
    images = torch.randn(5, 1, 32, 32)
    torch.testing.assert_close(encoder(images)[:1], encoder(images[:1]), rtol=1e-5, atol=1e-6)


def test_an_unknown_encoder_is_named_with_the_nearest_first() -> None:
    with pytest.raises(ValueError, match="unknown encoder 'resnet5O'; valid: resnet"):
        encoders.check(EncoderConfig(name="resnet5O"))


def test_a_name_in_timms_sources_is_known_without_importing_timm() -> None:
    code = (
        "import sys; from dml import encoders; from dml.config import EncoderConfig; "
        "encoders.check(EncoderConfig(name='resnet18')); sys.exit('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    encoders.check(EncoderConfig(name="resnet18.a1_in1k"))  # named with its weights: timm is asked


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped by DataParallel and a trainer"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_are_loaded_and_the_classifier_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, wrapped: bool
) -> None:
    torch.manual_seed(5)
    source = timm.create_model("resnet10t", num_classes=7)
    state = {key: value.clone() for key, value in source.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if wrapped:
        state = {f"module.{key}": value for key, value in state.items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    with caplog.at_level(logging.WARNING):
        config = EncoderConfig(name="resnet10t", weights=path.as_uri() if wrapped else str(path))
        encoder = encoders.build(config, channels=3, image_size=64)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder.backbone.eval()(images), source.reset_classifier(0) or source.eval()(images))
    assert "not used: ['fc.bias', 'fc.weight']" in caplog.text


def test_weights_of_another_network_are_refused_with_keys_of_both(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"no key of .*other.safetensors fits .* it has layer.weight \(2, 2\); needed: "
    ):
        encoders.build(EncoderConfig(weights=str(tmp_path / "other.safetensors")), channels=1, image_size=32)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("touched-by-pickle"),))  # type: ignore[return-value]


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"0.weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth is no state dict of plain tensors") as refused:
        encoders.build(EncoderConfig(weights=str(tmp_path / "evil.pth")), channels=1, image_size=32)
    assert "weights_only" not in str(refused.value), "nobody is told how to let it run"
    assert not Path("touched-by-pickle").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "notes.safetensors",
            b"not weights",
            r"notes\.safetensors is no state dict of plain tensors \(Safe",
        ),
        ("notes.pth", b"not weights", r"notes\.pth is no state dict of plain tensors \("),
        ("empty.pth", b"", r"empty\.pth is no state dict of plain tensors \(EOFError"),
        ("list.pth", [torch.zeros(2)], r"list\.pth has no tensors by name, .* it has no names"),
        ("trainer.pth", {"epoch": 3, "net": {"0.weight": torch.zeros(2)}}, r"has no tensors .* it has epoch, net"),
    ],
)
def test_a_file_that_holds_no_weights_is_named(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        encoders.build(EncoderConfig(weights=str(path)), channels=1, image_size=32)


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder\.weights: .*absent\.pth is not a file"):
        encoders.check(EncoderConfig(weights=str(tmp_path / "absent.pth")))
    away = EncoderConfig(weights=(tmp_path / "absent.pth").as_uri())
    encoders.check(away)  # a URI is opened where the weights are needed
    with pytest.raises(ValueError, match=r"encoder\.weights: file:.*absent\.pth cannot be read: "):
        encoders.build(away, channels=1, image_size=32)


def test_a_frozen_backbone_keeps_still_in_training_mode_too() -> None:
    encoder = encoders.build(EncoderConfig(name="resnet10t", dim=4), channels=3, image_size=32)
    encoder.freeze_backbone(True)
    before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    encoder.eval()
    encoder.train()
    encoder(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in encoder.backbone.state_dict().items()), "statistics"
    assert all(parameter.grad is None for parameter in encoder.backbone.parameters())
    assert all(parameter.grad is not None for parameter in encoder.projection.parameters())
    encoder.freeze_backbone(False)
    assert encoder.backbone.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def resnet(**settings: object) -> encoders.Encoder:
    config = EncoderConfig(name="resnet10t", dim=4).model_copy(update=settings)
    made = encoders.build(EncoderConfig(name=config.name, dim=config.dim), channels=3, image_size=32)
    return encoders.set_batch_norm(made, config, torch.device("cpu"))


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale() -> None:
    encoder = resnet(batch_norm="frozen")
    before = [buffer.clone() for buffer in encoder.buffers()]
    encoder.eval()
    encoder.train()
    images = torch.randn(4, 3, 32, 32)
    embeddings = encoder(images)
    torch.testing.assert_close(embeddings[:1], encoder(images[:1]), rtol=1e-4, atol=1e-5)
    embeddings[:, 0].sum().backward()
    assert all(torch.equal(buffer, old) for buffer, old in zip(encoder.buffers(), before, strict=True))
    assert all(layer.weight.grad is not None for layer in encoders.batch_norms(encoder))
    assert encoder.training
    assert not resnet(batch_norm="batch").statistics_frozen


def test_frozen_batch_norm_of_random_weights_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    resnet(batch_norm="frozen", weights="some.safetensors")
    encoders.set_batch_norm(
        encoders.build(EncoderConfig(), channels=1, image_size=16),
        EncoderConfig(batch_norm="frozen"),
        torch.device("cpu"),
    )
    assert caplog.text == "", "weights, or no BatchNorm at all"
    resnet(batch_norm="frozen")
    assert "batch_norm is frozen, but resnet10t starts from random weights" in caplog.text


def test_synchronised_batch_norm_is_refused_on_a_cpu_and_keeps_activations_on_gpus() -> None:
    with pytest.raises(ValueError, match=r"encoder[.]batch_norm sync needs GPUs, and this trains on cpu"):
        resnet(batch_norm="sync")
    config = EncoderConfig(name="efficientnet_b0", dim=4, batch_norm="sync")
    plain = encoders.build(config, channels=3, image_size=32)
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    expected = plain.eval()(torch.ones(1, 3, 32, 32))
    synced = encoders.set_batch_norm(plain, config, torch.device("cuda"))
    assert all(isinstance(layer, torch.nn.SyncBatchNorm) for layer in encoders.batch_norms(synced))
    assert state.keys() == synced.state_dict().keys(), "a checkpoint is loaded without it"
    torch.testing.assert_close(synced.eval()(torch.ones(1, 3, 32, 32)), expected)
