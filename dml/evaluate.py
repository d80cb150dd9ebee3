"""A dataset's embeddings -> one flat dict of metrics."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dml import draws, gather
from dml.config import Config, EvaluateConfig
from dml.data.datasets import DataError, ImageSet
from dml.data.images import normalise
from dml.data.loader import eval_batches
from dml.metrics import operating_points, retrieval, space, threshold
from dml.metrics.inputs import full_precision
from dml.metrics.operating_points import OperatingPoint, UnreachableFARError
from dml.metrics.pair_counts import PairGrid, cell_edge, positives_histogram
from dml.metrics.threshold_range import cell_of_frr

Gallery = tuple[Tensor, Tensor]
FAR_TARGETS = (1e-1, 1e-2, 1e-3)
"""False accept rates that a model gets operating points for."""


def embed(
    encoder: nn.Module,
    data: ImageSet,
    config: Config,
    *,
    device: torch.device,
    group: gather.Group | None = None,
    done: Callable[[int], None] | None = None,
) -> Tensor:
    """Embeds every image of a set, in order, with the evaluation transform; rows are split exactly over ranks.

    Args:
        encoder: float32 (B, channels, S, S) -> (B, D) of unit norm; its training mode is restored afterwards.
        data: the images.
        config: transform, precision and batch.
        device: where the encoder lies.
        group: ranks that share the work; each gets all rows.
        done: called after each batch with the number of its images, for a progress bar.

    Returns:
        float32 (N, D) on the device.
    """
    training = encoder.training
    encoder.eval()
    with torch.inference_mode(), autocast(config, device):
        parts = []
        for batch in eval_batches(data, config, rank=gather.rank(group), world=gather.world(group)):
            parts.append(encoder(normalise(batch.images.to(device, non_blocking=True), config.data)))
            if done is not None:
                done(len(batch.images))
        rows = torch.cat(parts) if parts else torch.empty(0, config.encoder.dim, device=device)
        everyone = gather.gather(rows, gather.row_counts(len(rows), group, device), group)
    encoder.train(training)
    return everyone


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The context that the encoder runs in: bf16 on GPUs when the config says so, else fp32."""
    bf16 = config.train.precision == "bf16" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def curves(
    embeddings_ND: Tensor,
    labels_N: Tensor,
    config: EvaluateConfig,
    *,
    gallery: Gallery | None = None,
    group: gather.Group | None = None,
) -> threshold.ThresholdCurves | None:
    """Threshold curves with the calibration range, grid and distance that a config states.

    Returns:
        None for collapsed embeddings: so many negatives are as near as can be that no threshold reaches far_min.

    Raises:
        UnreachableFARError: there are too few negatives for far_min, whatever the embeddings.
    """
    try:
        return threshold.threshold_curves(
            embeddings_ND,
            labels_N,
            gallery=gallery,
            far_range=(config.far_min, config.far_max),
            num_thresholds=config.thresholds,
            distance=config.distance,
            group=group,
        )
    except UnreachableFARError:
        if config.far_min * PairGrid.of(embeddings_ND, labels_N, gallery).negatives < 1:
            raise
        return None


def measure(
    embeddings_ND: Tensor, labels_N: Tensor, config: EvaluateConfig, *, group: gather.Group | None = None
) -> dict[str, float]:
    """Recall@k, OPIS and what must stand beside it, and the score.

    Args:
        embeddings_ND: floating (N, D), the same on every rank.
        labels_N: int64 (N,).
        config: calibration range, utility and score weight.
        group: ranks that share the work; each gets the same figures.

    Returns:
        recall@1, recall@2, recall@4, recall@8, queries_left_out; opis, sqrt_opis, epsilon_opis, opis_noise_floor (the
        OPIS that the number of pairs alone would give), mean_utility; the similarities of `bounding_similarities`;
        score = recall@1 - score_weight * sqrt_opis.
        Collapsed embeddings, which no threshold can be set for, get COLLAPSED, the worst figures there are.
    """
    return metrics_and_curves(embeddings_ND, labels_N, config, group=group)[0]


def metrics_and_curves(
    embeddings_ND: Tensor, labels_N: Tensor, config: EvaluateConfig, *, group: gather.Group | None = None
) -> tuple[dict[str, float], threshold.ThresholdCurves | None]:
    """The metrics of `measure`, with the curves that they were read from."""
    found = retrieval.recall_at_k(embeddings_ND, labels_N, group=group)
    lines = curves(embeddings_ND, labels_N, config, group=group)
    metrics = {name: value for name, value in found.items() if name != "queries"}
    metrics |= consistency(lines, config.utility_c)
    metrics |= bounding_similarities(embeddings_ND, labels_N, config, lines, group=group)
    return metrics | {"score": score(metrics["recall@1"], metrics["opis"], config.score_weight)}, lines


# Embeddings so alike that no threshold tells the nearest negatives apart: OPIS at its largest, utility at its smallest.
COLLAPSED = {"opis": 0.25, "sqrt_opis": 0.5, "epsilon_opis": 1.0, "opis_noise_floor": 0.0, "mean_utility": 0.0}


def consistency(lines: threshold.ThresholdCurves | None, c: float) -> dict[str, float]:
    """OPIS and what must stand beside it, from the curves of `curves`; COLLAPSED for None."""
    if lines is None:
        return dict(COLLAPSED)
    opis = threshold.opis(lines, c)
    return {
        "opis": opis,
        "sqrt_opis": opis**0.5,
        "epsilon_opis": threshold.epsilon_opis(lines, c=c),
        "opis_noise_floor": threshold.noise_floor(lines, c),
        "mean_utility": threshold.mean_utility(lines, c),
    }


def bounding_similarities(
    embeddings_ND: Tensor,
    labels_N: Tensor,
    config: EvaluateConfig,
    lines: threshold.ThresholdCurves | None,
    *,
    group: gather.Group | None = None,
) -> dict[str, float]:
    """The cosine similarities at the bounds of FAR and FRR, which margins can be designed from.

    Args:
        embeddings_ND: floating (N, D), the same on every rank.
        labels_N: int64 (N,).
        config: far_min and far_max, and the distance of the curves.
        lines: of `curves`; None for collapsed embeddings.
        group: ranks that share the work; each gets the same figures.

    Returns:
        similarity_at_far_min, similarity_at_far_max: those that shares far_min and far_max of all negatives reach, 1
        for collapsed embeddings. similarity_at_frr_max: the largest that at most a share far_max of all positives stay
        below; the least of the positives where these are too few to tell such a share.
    """
    grid = PairGrid.of(embeddings_ND, labels_N)
    with full_precision(grid.device):
        positives = positives_histogram(grid, group)
    try:
        cell = cell_of_frr(positives, config.far_max)
    except ValueError:
        cell = int(positives.nonzero()[0][0])
    ends = (0.0, 0.0) if lines is None else lines.thresholds_T[[0, -1]]
    near, far = (float(operating_points.to_similarity(end, config.distance)) for end in ends)
    return {
        "similarity_at_far_min": near,
        "similarity_at_far_max": far,
        "similarity_at_frr_max": min(1.0, cell_edge(cell)),
    }


def calibrate(
    embeddings_ND: Tensor,
    labels_N: Tensor,
    config: EvaluateConfig,
    far: Sequence[float] = FAR_TARGETS,
    *,
    gallery: Gallery | None = None,
    group: gather.Group | None = None,
) -> tuple[OperatingPoint, ...]:
    """Operating points for those FAR targets that these samples can tell from 0, largest first; none when collapsed.

    Args:
        embeddings_ND: floating (N, D), the same on every rank.
        labels_N: int64 (N,).
        config: the distance.
        far: targets.
        gallery: embeddings and labels that the rows are compared with, instead of one another.
        group: ranks that share the work.
    """
    return reachable(
        lambda targets: operating_points.calibrate(
            embeddings_ND, labels_N, gallery=gallery, far=targets, distance=config.distance, group=group
        ),
        far,
    )


def reachable(
    calibrate: Callable[[Sequence[float]], tuple[OperatingPoint, ...]], far: Sequence[float]
) -> tuple[OperatingPoint, ...]:
    """The operating points of as many targets, the largest first, as the pairs at hand can tell from 0."""
    targets = sorted(far, reverse=True)
    while targets:
        try:
            return calibrate(targets)
        except UnreachableFARError:
            targets.pop()
    return ()


def negative_pairs(labels_N: Tensor) -> int:
    """Unordered pairs of two classes among N samples: what a FAR is counted over."""
    own = torch.unique(labels_N, return_counts=True)[1]
    return (len(labels_N) ** 2 - int((own**2).sum())) // 2


def check(data: ImageSet, config: EvaluateConfig) -> None:
    """Raises DataError when a set has too few negative pairs for OPIS's calibration range."""
    negatives = negative_pairs(torch.from_numpy(data.labels_N))
    if config.far_min * negatives < 1:
        raise DataError(
            f"evaluate.far_min {config.far_min:g} cannot be told from 0 with the {negatives} negative pairs of val "
            f"({len(data)} images, {len(data.classes)} classes); the smallest FAR they resolve is {1 / negatives:g}"
        )


def score(recall: float, opis: float, weight: float) -> float:
    """Recall@1 - weight * sqrt(OPIS), what an epoch and a model are chosen by, on val.

    Args:
        recall: Recall@1 in [0, 1].
        opis: OPIS in [0, 0.25]; its root is in units of utility.
        weight: w, at least 0.
    """
    return float(recall - weight * opis**0.5)


def evaluate(
    encoder: nn.Module,
    data: ImageSet,
    config: Config,
    *,
    device: torch.device,
    group: gather.Group | None = None,
    prefix: str = "val",
) -> dict[str, float]:
    """Embeds a set and measures it over all ranks; every rank gets the same figures.

    Args:
        encoder: as in `embed`.
        data: the images, of classes that were not trained on.
        config: everything about transform and metrics.
        device: where the encoder lies.
        group: ranks that share the embedding.
        prefix: put before every name: val/recall@1.
    """
    embeddings = embed(encoder, data, config, device=device, group=group)
    labels = torch.from_numpy(data.labels_N)
    metrics = measure(embeddings, labels, config.evaluate, group=group)
    # Figures that ranks computed on different machines may differ in the last bit, and ranks must decide alike.
    values = gather.broadcast_floats([metrics[name] for name in MEASURES], group, device)
    return {f"{prefix}/{name}": value for name, value in zip(MEASURES, values, strict=True)}


def train_sample(data: ImageSet, config: Config) -> ImageSet:
    """The training images that `space_of` looks at: about config.evaluate.train_images, the same in the whole run.

    Classes in an order that depends on the seed alone, each with as many images as give every class its share, and at
    least SAMPLE_PER_CLASS where it has them: of single images there is no distance inside a class.
    """
    most = config.evaluate.train_images
    share = max(SAMPLE_PER_CLASS, -(-most // len(data.classes)))
    order_N = draws.permutation(config.train.seed, _SAMPLE, n=len(data))
    class_order_C = draws.permutation(config.train.seed, _SAMPLE, 1, n=len(data.classes))
    place_N = class_order_C[data.labels_N[order_N]]
    order_N = order_N[np.argsort(place_N, kind="stable")]
    place_N = np.sort(place_N)
    within_N = np.arange(len(order_N)) - np.searchsorted(place_N, place_N)
    return data.subset(order_N[within_N < share][:most])


def space_of(
    encoder: nn.Module, sample: ImageSet, config: Config, *, device: torch.device, group: gather.Group | None = None
) -> dict[str, float]:
    """train/pi_intra, train/pi_inter, train/pi_ratio and train/spectral_decay of a sample of the training images.

    Args:
        encoder: as in `embed`.
        sample: of `train_sample`.
        config: everything about the transform.
        device: where the encoder lies.
        group: ranks that share the embedding.

    Returns:
        The figures of dml.metrics.space; none for fewer than two classes, or without two images of one class.
    """
    if len(sample.classes) < 2 or np.bincount(sample.labels_N).max() < 2:
        return {}
    embeddings = embed(encoder, sample, config, device=device, group=group)
    found = space.space(embeddings, torch.from_numpy(sample.labels_N))
    return {f"train/{name}": value for name, value in found.items()}


SAMPLE_PER_CLASS = 8
_SAMPLE = 0x5A3  # keeps the draws of the sample apart from those of batches and augmentation

MEASURES = (
    "recall@1",
    "recall@2",
    "recall@4",
    "recall@8",
    "queries_left_out",
    "opis",
    "sqrt_opis",
    "epsilon_opis",
    "opis_noise_floor",
    "mean_utility",
    "similarity_at_far_min",
    "similarity_at_far_max",
    "similarity_at_frr_max",
    "score",
)
