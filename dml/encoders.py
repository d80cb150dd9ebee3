"""Encoders: images (B, channels, H, W) -> unit embeddings (B, D)."""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dml.config import EncoderConfig
from dml.names import unknown

log = logging.getLogger(__name__)


class Encoder(nn.Module):
    """Backbone, linear projection and L2 normalisation.

    Args:
        backbone: maps images float32 (B, channels, H, W) to pooled features (B, F).
        features: F.
        dim: D, dimension of the embedding.
    """

    def __init__(self, backbone: nn.Module, features: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Linear(features, dim)
        self.dim = dim
        self.backbone_frozen = self.statistics_frozen = False

    def forward(self, images: Tensor) -> Tensor:
        """Images float (B, channels, H, W) -> embeddings float32 (B, D) of unit norm, also under autocast.

        Those of an encoder in double precision are float64.
        """
        projected: Tensor = self.projection(self.backbone(images))
        return F.normalize(projected if projected.dtype == torch.float64 else projected.float(), dim=1)

    def freeze_backbone(self, frozen: bool) -> None:
        """Whether the backbone keeps still: no gradients, no moving statistics, no dropout, in training mode too.

        A DistributedDataParallel around this module must be made anew afterwards: it fixes at its start what it
        synchronises.
        """
        self.backbone_frozen = frozen
        self.backbone.requires_grad_(not frozen)
        self.train(self.training)

    def freeze_statistics(self, frozen: bool) -> None:
        """Whether BatchNorm normalises by its stored statistics, and keeps them, in training mode too.

        Its scale and shift train on, as in the code of Roth et al., Revisiting Training Strategies and Generalization
        Performance in Deep Metric Learning, ICML 2020, arXiv 2002.08473. An image's embedding then depends on no other.
        """
        self.statistics_frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Sets training or evaluation mode, in which what is frozen stays."""
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        if self.statistics_frozen:
            for layer in batch_norms(self):
                layer.eval()
        return self


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of a module, of any dimension and kind."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def set_batch_norm(encoder: Encoder, config: EncoderConfig, device: torch.device) -> Encoder:
    """The encoder with BatchNorm as config.batch_norm has it for training; one without BatchNorm is left as it is.

    Args:
        encoder: the one of `build`; changed in place.
        config: batch_norm.
        device: where it will train.

    Raises:
        ValueError: sync on a device that is no GPU.
    """
    if config.batch_norm == "sync" and device.type != "cuda":
        raise ValueError(
            f"encoder.batch_norm sync needs GPUs, and this trains on {device.type}: choose frozen, or batch"
        )
    layers = batch_norms(encoder)
    if config.batch_norm == "frozen":
        encoder.freeze_statistics(True)
        if layers and not config.pretrained and config.weights is None:
            log.warning(
                "encoder.batch_norm is frozen, but %s starts from random weights: its statistics say nothing of "
                "any data; set encoder.batch_norm batch, or give it weights",
                config.name,
            )
    elif config.batch_norm == "sync" and layers:
        # timm's, since torch's own would lose the activation that timm builds into some of these layers.
        from timm.layers.norm_act import convert_sync_batchnorm

        encoder.backbone = convert_sync_batchnorm(encoder.backbone)  # type: ignore[no-untyped-call]
    return encoder


def check_compiler(device: torch.device) -> None:
    """Raises ValueError, with the compiler's reason, where torch.compile cannot compile for this device."""
    try:
        # Something small: what is missing then shows in seconds, and not as an error of the encoder.
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # of dynamo, inductor, triton or the C++ compiler, each with classes of its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        needed = "triton" if device.type == "cuda" else "a C++ compiler"
        raise ValueError(
            f"train.compile cannot compile for {device.type} here: {reason.strip()}; it needs {needed}, or turn it off"
        ) from error


class SmallCNN(nn.Sequential):
    """Four 3 x 3 convolutions with GroupNorm, for small images and training from scratch on a CPU.

    GroupNorm, since it does not depend on the batch: the embedding of an image is the same alone and in company, on
    one rank and on many.

    Args:
        channels: 1 or 3.
        widths: channels after each convolution; the first keeps the resolution, the others halve it.
    """

    def __init__(self, channels: int, widths: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        layers: list[nn.Module] = []
        before = channels
        for depth, width in enumerate(widths):
            layers += [
                nn.Conv2d(before, width, 3, stride=1 if depth == 0 else 2, padding=1, bias=False),
                nn.GroupNorm(8, width),
                nn.ReLU(inplace=True),
            ]
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.num_features = widths[-1] * 4


OWN_ENCODERS = {"small_cnn": SmallCNN}


def check(config: EncoderConfig) -> None:
    """Raises ValueError when no encoder has this name, the nearest ones first, or weights is a path without a file."""
    if config.weights is not None and "://" not in config.weights and not Path(config.weights).expanduser().is_file():
        raise ValueError(f"encoder.weights: {config.weights} is not a file")
    if config.name in OWN_ENCODERS or _in_timms_sources(config.name):
        return
    import timm

    if not timm.is_model(config.name):
        raise ValueError(unknown("encoder", config.name, [*OWN_ENCODERS, *timm.list_models()]))


def _in_timms_sources(name: str) -> bool:
    """Whether timm defines a model of this plain name: read in its files, since importing them all takes seconds."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        return False
    definition = f"@register_model\ndef {name}("
    return any(definition in file.read_text("utf-8") for file in Path(spec.origin).parent.glob("models/*.py"))


def build(config: EncoderConfig, *, channels: int, image_size: int) -> Encoder:
    """The encoder that a config names, randomly initialised or with the weights it points to.

    Args:
        config: name, pretrained, weights, dim.
        channels: 1 or 3.
        image_size: height and width of the input in pixels (vision transformers are built for one size).

    Raises:
        ValueError: as `check` and `load_weights`.
    """
    check(config)
    if config.name in OWN_ENCODERS:
        if config.pretrained:
            raise ValueError(f"encoder.pretrained: {config.name} has no published weights; use a timm model or weights")
        own = OWN_ENCODERS[config.name](channels)
        backbone, features = cast(nn.Module, own), own.num_features
    else:
        backbone, features = _timm(config, channels, image_size)
    if config.weights is not None:
        load_weights(backbone, config.weights)
    return Encoder(backbone, features, config.dim)


def _timm(config: EncoderConfig, channels: int, image_size: int) -> tuple[nn.Module, int]:
    import timm

    published = timm.get_pretrained_cfg(config.name)
    fixed = published is not None and published.fixed_input_size and image_size != published.input_size[-1]
    size: dict[str, Any] = {"img_size": image_size} if fixed else {}
    try:
        model: Any = timm.create_model(
            config.name, pretrained=config.pretrained, num_classes=0, in_chans=channels, **size
        )
    except OSError as error:
        raise ValueError(
            f"encoder.pretrained: the weights of {config.name} cannot be fetched ({str(error).splitlines()[0]}); "
            "point encoder.weights to a file of them, or turn it off"
        ) from error
    return model, int(getattr(model, "head_hidden_size", None) or model.num_features)


def load_weights(backbone: nn.Module, uri: str) -> None:
    """Loads a state dict into a backbone, without pickle.

    Wrappers that checkpoints carry ({"state_dict": ...}, "module." and "backbone." before every key) are taken off; the
    classifier's keys, and any other that the backbone lacks or has in another shape, are dropped and listed in a
    warning.

    Args:
        backbone: module whose parameters are replaced in place.
        uri: path or fsspec URI of a .safetensors or .pth / .pt / .bin file.

    Raises:
        ValueError: the file cannot be read, is no state dict of plain tensors, or nothing in it fits; the last message
            shows keys of both sides.
    """
    state = _read_state(uri)
    own = backbone.state_dict()
    fits = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    if not fits:
        raise ValueError(
            f"encoder.weights: no key of {uri} fits this backbone; it has {_some(state)}; needed: {_some(own)}"
        )
    left_out = sorted(key for key in state if key not in fits)
    missing = [key for key in own if key not in fits]
    backbone.load_state_dict(fits, strict=False)
    if left_out or missing:
        log.warning("%s: %d keys loaded; not used: %s; not in the file: %s", uri, len(fits), left_out, missing)


def _read_state(uri: str) -> Mapping[str, Tensor]:
    import fsspec  # type: ignore[import-untyped]
    import safetensors.torch

    try:
        with fsspec.open(uri, "rb") as file:
            if uri.endswith(".safetensors"):
                state: Any = safetensors.torch.load(file.read())
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, ImportError) as error:  # the latter where the URI's file system is not installed
        raise ValueError(f"encoder.weights: {uri} cannot be read: {error}") from error
    except Exception as error:  # of safetensors, zip or pickle; torch's own words would advise to run the file's code
        raise ValueError(
            f"encoder.weights: {uri} is no state dict of plain tensors ({type(error).__name__}); valid: a .safetensors "
            "file, or what torch.save writes of model.state_dict(); nothing else is unpickled"
        ) from error
    state = state if isinstance(state, Mapping) else {}
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"encoder.weights: {uri} has no tensors by name, bare or under state_dict or model; it has "
            f"{', '.join(map(str, list(state)[:4])) or 'no names'}"
        )
    for prefix in ("module.", "backbone."):
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _some(state: Mapping[str, Tensor], count: int = 4) -> str:
    shown = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(state.items())[:count])
    return f"{shown}, ..." if len(state) > count else shown
