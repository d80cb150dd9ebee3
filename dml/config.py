"""What a run is made of: frozen, typed settings that refuse unknown names.

A `Config` is printed, logged to MLflow and stored in every checkpoint, so a model always carries how it was made.
Recipes (`dml.recipes`) return one; command lines change single fields (`--optim.lr 3e-4`).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Cosine = Annotated[float, Field(ge=-1.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of settings; an unknown name or a wrong value is refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,  # JSON, in which checkpoints keep settings, has neither
    )


class DataConfig(Section):
    """Which images, how their classes are split, and how an image becomes a tensor."""

    dataset: str = "glyphs"
    """Name in dml.data.datasets.DATASETS: glyphs, digits or image_folder."""
    root: str | None = None
    """image_folder only: the folder that holds one folder of images a class."""
    split_csv: str | None = None
    """image_folder only: a CSV with the columns path,label,split (train, val or test); paths are relative to root."""
    val_fraction: Unit = 0.25
    """Share of the classes that go to val, where every selection is made."""
    test_fraction: Unit = 0.25
    """Share of the classes that go to test, which are embedded once, for the final report."""
    train_on_val: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the val classes that train instead, for a last training when all is chosen; at least 2 stay val."""
    split_seed: int = 0
    """Seed of the split rule: classes are ranked by SHA-256 of "seed/class name"."""
    image_size: Count = 32
    """Height and width of what the encoder sees, in pixels."""
    channels: Literal[1, 3] = 1
    """1 reads images as grayscale, 3 as RGB."""
    mean: Unit = 0.5
    """Subtracted from pixel values in [0, 1]; the same for every channel."""
    std: Positive = 0.5
    """Pixel values are divided by it after the mean is subtracted."""
    augment: Literal["none", "affine", "crop"] = "affine"
    """Training only. affine: small shift, turn and scale. crop: random resized crop and flip (photographs)."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each rank that decode images ahead of the training step; unset, as many as it has CPUs."""


class BatchConfig(Section):
    """A global batch is P classes x K samples, shared out over all ranks; how they are chosen."""

    classes: Annotated[int, Field(ge=2)] = 32
    """P: classes in a global batch."""
    samples: Count = 4
    """K: samples of each class; 1 only with a loss that needs no positives (proxies)."""
    sampler: str = "pk"
    """Name in dml.data.sampler.SAMPLERS: which images make a batch. random fills P x K places whatever the classes."""
    small_classes: Literal["repeat", "refuse"] = "repeat"
    """Classes with fewer than K samples: repeat uses some more than once in a batch, though never as a positive of
    themselves; refuse does not train."""
    candidates: Annotated[int, Field(ge=2)] = 8
    """Samplers that choose by embeddings only: how many batches a step chooses among."""
    embed_every: Count = 1
    """Samplers that choose by embeddings only: epochs between two embeddings of the training images."""

    @property
    def size(self) -> int:
        """Images in a global batch: P x K."""
        return self.classes * self.samples


class EncoderConfig(Section):
    """Backbone, pooling and projection: (B, channels, H, W) -> (B, dim), unit norm."""

    name: str = "small_cnn"
    """small_cnn (GroupNorm, for small images, from scratch) or any timm model name, e.g. resnet50."""
    pretrained: bool = False
    """Load timm's published weights (downloads them)."""
    weights: str | None = None
    """Path or URI of a .safetensors or .pth state dict for the backbone; loaded without pickle, classifier dropped."""
    dim: Count = 64
    """D: dimension of the embedding."""
    batch_norm: Literal["batch", "frozen", "sync"] = "batch"
    """What BatchNorm layers normalise by in training. batch: each rank's part of the batch. frozen: the statistics that
    the weights came with, for pretrained backbones; scale and shift still train. sync: the global batch, GPUs only."""

    @property
    def bare(self) -> Self:
        """The same architecture without weights from elsewhere, for weights that are at hand."""
        return self.model_copy(update={"pretrained": False, "weights": None})


class LossConfig(Section):
    """The metric-learning loss; TCM is added to it separately."""

    name: str = "multi_similarity"
    """Name in dml.losses.LOSSES, or package.module:Class for any torch.nn.Module called with (embeddings, labels)."""
    options: dict[str, float] = Field(default_factory=dict)
    """Settings of that loss, by the names of its constructor, e.g. alpha 2 beta 50."""
    miner: str | None = None
    """Losses over tuples only: name in dml.miners.MINERS; unset, the loss's own default."""
    rho: Unit = 0.0
    """Losses over tuples only: probability that a tuple (a, p, n) becomes (a, a, p), which pushes a class apart."""


class MemoryConfig(Section):
    """Cross-batch memory (Wang et al., CVPR 2020, arXiv 1912.06798): earlier embeddings that pair losses also see."""

    size: Annotated[int, Field(ge=0)] = 0
    """Embeddings kept; 0 trains without a memory. TCM never sees it."""
    start: Unit = 0.0
    """Fraction of training after which it is used: embeddings of a young encoder are soon stale."""


class TCMConfig(Section):
    """Threshold-consistent margin (Zhang et al., ICLR 2024, arXiv 2307.04047), added to the loss."""

    weight: NonNegative = 0.0
    """Factor on the TCM term once it is fully on; 0 trains the baseline without TCM."""
    margin_pos: Cosine = 0.9
    """Positive pairs with a cosine similarity at or below it are pulled up to it."""
    margin_neg: Cosine = 0.5
    """Negative pairs with a cosine similarity at or above it are pushed down to it."""
    weight_pos: NonNegative = 1.0
    """Factor on the positive term."""
    weight_neg: NonNegative = 1.0
    """Factor on the negative term."""
    start: Unit = 0.0
    """Fraction of training after which TCM is switched on."""
    ramp: Unit = 0.1
    """Fraction of training over which the weight then rises linearly from 0."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.margin_neg > self.margin_pos:
            raise ValueError(f"margin_neg ({self.margin_neg:g}) must not exceed margin_pos ({self.margin_pos:g})")
        return self


class OptimConfig(Section):
    """Optimiser and learning-rate schedule."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """adamw; adam, whose decay is part of the gradient; or sgd with momentum 0.9."""
    lr: Positive = 1e-3
    """Peak learning rate of the backbone."""
    projection_lr: Positive | None = None
    """Peak learning rate of the projection; unset, that of the backbone."""
    loss_lr: Positive = 1e-2
    """Peak learning rate of the loss's own parameters (proxies)."""
    weight_decay: NonNegative = 1e-4
    """Decay of the encoder's weight matrices; none on norms, biases and proxies."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """What the rates do after the warm-up: stay, fall to 0 along a cosine, or fall by step_factor now and then."""
    step_every: Positive = 0.4
    """schedule step only: fraction of training between two falls of the rates."""
    step_factor: Unit = 0.1
    """schedule step only: factor of each fall."""
    warmup: Unit = 0.05
    """Fraction of training over which the rates rise linearly."""
    frozen_backbone: Unit = 0.0
    """Fraction of training at its start in which only the projection and the loss's own parameters train, on features
    of the backbone in evaluation mode; the backbone's own warm-up follows. 1 never trains the backbone."""
    clip: NonNegative = 1.0
    """Largest norm of the encoder's gradient; 0 does not clip."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay of a moving average of the encoder's weights, per step (0.999 spans about 1,000 steps); it is then what is
    evaluated and kept. 0 keeps the weights themselves."""


class TrainConfig(Section):
    """How long, how often evaluated, in which precision."""

    epochs: Count = 6
    """Epochs to train."""
    steps_per_epoch: int | None = Field(default=None, ge=1)
    """Steps of an epoch; unset, as many as cover the training images once (images / batch size, rounded up)."""
    eval_every: Count = 1
    """Epochs between evaluations on val; the last epoch is always evaluated."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Images of a rank that go through the encoder at a time, for batches beyond memory; unset, its whole share of the
    batch. The gradient is the same for a third more work; BatchNorm that is not frozen normalises by each chunk."""
    patience: int | None = Field(default=None, ge=1)
    """Evaluations in a row without a better val score after which training ends early; unset, it never does."""
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, beside the one of every evaluated epoch; unset, those alone. Ray Train takes one every
    2 seconds; training waits where they come faster."""
    seed: int = 0
    """Seed of the weights, the batches and the augmentation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 autocasts the encoder on GPUs; losses stay in fp32."""
    compile: bool = False
    """Compiles the encoder's training pass with torch.compile: minutes at the start for faster steps on GPUs. Needs
    triton on GPUs and a C++ compiler on CPUs."""
    log_every: Count = 10
    """Steps between readings of the loss (each waits for the device)."""


class EvaluateConfig(Section):
    """How embeddings are judged. Recall@1 and OPIS always come from the same epoch."""

    far_min: Unit = 0.01
    """Global false accept rate at the lower end of OPIS's calibration range."""
    far_max: Unit = 0.10
    """Global false accept rate at the upper end of OPIS's calibration range."""
    thresholds: Annotated[int, Field(ge=2)] = 101
    """T: equally spaced thresholds in the calibration range, ends included."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """Distance that the thresholds are spaced in: Euclidean sqrt(2 - 2 s) or cosine 1 - s."""
    utility_c: Positive = 1.0
    """c of the utility; 1 is F1 of sensitivity and specificity, above 1 favours sensitivity."""
    score_weight: NonNegative = 1.0
    """w of the score that chooses the epoch and the model: Recall@1 - w * sqrt(OPIS)."""
    batch: Count = 256
    """Images embedded at a time on each rank."""
    train_images: Annotated[int, Field(ge=0)] = 1024
    """Training images, the same ones in the whole run, whose embedding space is measured at every evaluation (pi_intra,
    pi_inter, pi_ratio, spectral_decay); 0 measures none."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.far_min < self.far_max < 1:
            raise ValueError(f"needs 0 < far_min < far_max < 1, got {self.far_min:g} and {self.far_max:g}")
        return self


class Config(Section):
    """Everything that decides how a model is trained and judged."""

    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    encoder: EncoderConfig = EncoderConfig()
    loss: LossConfig = LossConfig()
    memory: MemoryConfig = MemoryConfig()
    tcm: TCMConfig = TCMConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        if self.batch.samples > 1 and self.memory.size == 0:
            return self
        from dml.losses import LOSSES  # here, since they stand on this module

        loss = LOSSES.get(self.loss.name)  # what is not there comes from outside and is not imported to be asked
        if loss and self.batch.samples < 2 and self.batch.sampler != "random" and loss.needs_positives:
            free = ", ".join(name for name, other in LOSSES.items() if not other.needs_positives)
            raise ValueError(
                f"batch.samples is {self.batch.samples}, but loss {self.loss.name} needs positives: at least 2 samples "
                f"of a class, or one of {free}"
            )
        if loss and self.memory.size > 0 and not loss.takes_memory:
            takers = ", ".join(name for name, other in LOSSES.items() if other.takes_memory)
            raise ValueError(
                f"memory.size is {self.memory.size}, but loss {self.loss.name} takes none; valid: {takers}"
            )
        return self

    @property
    def flat(self) -> dict[str, str | int | float | bool | None]:
        """The settings as {"section.field": value}; options of the loss as "loss.options.name"."""
        return dict(_leaves(self.model_dump()))

    def replace(self, **changes: object) -> Self:
        """A copy with dotted fields changed: `config.replace(**{"optim.lr": 3e-4})`, validated like any other.

        Raises:
            KeyError: a name that is no field; it lists the nearest valid ones.
        """
        tree = self.model_dump()
        for name, value in changes.items():
            *path, leaf = name.split(".")
            node: Any = tree
            for part in path:
                node = node.get(part) if isinstance(node, dict) else None
            if not isinstance(node, dict) or (leaf not in node and path != ["loss", "options"]):
                from dml.names import unknown

                raise KeyError(unknown("setting", name, self.flat))
            node[leaf] = value
        return type(self).model_validate(tree)


def _leaves(tree: dict[str, object], prefix: str = "") -> "list[tuple[str, str | int | float | bool | None]]":
    rows: list[tuple[str, str | int | float | bool | None]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            rows += _leaves(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, value))  # type: ignore[arg-type]
    return rows
