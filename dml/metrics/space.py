"""How embeddings fill their space: classes tight or wide, near or far, and how many directions are in use."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dml.metrics.inputs import Array, Floats, normalised, unit_rows

CHUNK = 8192
"""Rows held in float64 at a time."""
RESOLUTION = 1e-6
"""Below this share of the largest, a singular value or the length of a class mean is rounding, not structure."""


def space(embeddings_ND: Array, labels_N: Array) -> dict[str, float]:
    """Density of an embedding space: distances inside and between classes, and the decay of its spectrum.

    Cosine distance, 1 - s in [0, 2], on unit rows, in float64. No table of pairs is needed: the products of n unit rows
    x_i with each other add up to |sum x_i|^2, n of which are a row's with itself, so the mean cosine distance over the
    pairs is (n^2 - |sum x_i|^2) / (n (n - 1)). Memory beyond the embeddings: C x D and D x D floats.

    Roth et al., "Revisiting Training Strategies and Generalization Performance in Deep Metric Learning", ICML 2020,
    arXiv 2002.08473.

    Args:
        embeddings_ND: (N, D) floats of any width, NumPy or torch; rows are normalised.
        labels_N: (N,) integers.

    Returns:
        pi_intra: mean over classes of the mean cosine distance of a class's pairs, in [0, 2]; classes of one sample
            have none and are left out.
        pi_inter: mean cosine distance of the pairs of normalised class means, all classes, in [0, 2]. A mean of length
            zero has no direction and counts as at a right angle, distance 1, to every other.
        pi_ratio: pi_intra / max(pi_inter, 1e-8).
        spectral_decay: see `spectral_decay`.
        All are finite.

    Raises:
        ValueError: bad input (see `dml.metrics.inputs.unit_rows`).
    """
    rows_ND, labels = unit_rows(embeddings_ND, labels_N)
    _, class_N, sizes_C = labels.unique(return_inverse=True, return_counts=True)
    sums_CD = torch.zeros(len(sizes_C), rows_ND.shape[1], dtype=torch.float64, device=rows_ND.device)
    for part_BD, class_B in zip(_in_float64(rows_ND), class_N.split(CHUNK), strict=True):
        sums_CD.index_add_(0, class_B, part_BD)
    sizes_C = sizes_C.double()
    several_C = sizes_C > 1
    intra = float(_mean_distance(sums_CD[several_C].square().sum(dim=1), sizes_C[several_C]).mean())
    inter = _between(sums_CD / sizes_C[:, None])
    return {
        "pi_intra": intra,
        "pi_inter": inter,
        "pi_ratio": intra / max(inter, 1e-8),
        "spectral_decay": spectral_decay(_spectrum(rows_ND)),
    }


def _mean_distance(squared_sum: Tensor, n: Tensor) -> Tensor:
    return ((n.square() - squared_sum) / (n * (n - 1))).clamp(0, 2)


def _between(means_CD: Tensor) -> float:
    lengths_C1 = means_CD.norm(dim=1, keepdim=True)
    directions_CD = torch.where(lengths_C1 > RESOLUTION, means_CD / lengths_C1, 0)
    classes, directed = len(means_CD), int((lengths_C1 > RESOLUTION).sum())
    products = float(directions_CD.sum(dim=0).square().sum()) - directed
    return min(max(1 - products / (classes * (classes - 1)), 0.0), 2.0)


def singular_values(embeddings_ND: Array) -> Floats:
    """Singular values of the matrix of unit rows, not centred.

    The roots of the eigenvalues of the D x D Gram matrix, which is summed in float64 over chunks of rows.

    Args:
        embeddings_ND: (N, D) floats of any width, NumPy or torch; rows are normalised.

    Returns:
        (min(N, D),) float64, descending, at least 0; their squares add up to N. Those below about 1e-7 of the largest
        are rounding.

    Raises:
        ValueError: no (N, D) floats with N and D at least 1, or a row of zeros, or with NaN or infinity.
    """
    rows_ND = torch.as_tensor(embeddings_ND).detach()
    if rows_ND.ndim != 2 or not rows_ND.numel() or not rows_ND.is_floating_point():
        raise ValueError(f"needs floats (N, D), N and D at least 1, got {rows_ND.dtype} {tuple(rows_ND.shape)}")
    return _spectrum(normalised(rows_ND, "embeddings"))


def _spectrum(rows_ND: Tensor) -> Floats:
    n, dim = rows_ND.shape
    gram_DD = torch.zeros(dim, dim, dtype=torch.float64, device=rows_ND.device)
    for part_BD in _in_float64(rows_ND):
        gram_DD.addmm_(part_BD.T, part_BD)
    descending_D = torch.linalg.eigvalsh(gram_DD).clamp(min=0).sqrt().flip(0)
    values_S: Floats = descending_D[:n].cpu().numpy()
    return values_S


def spectral_decay(singular_values_S: Floats) -> float:
    """rho: the Kullback-Leibler divergence of the spectrum, scaled to sum 1, from the uniform one.

    rho = sum_i 1/S log((1/S) / (s_i / sum s)), natural logarithm: 0 when all directions are used alike, larger the
    fewer carry the embeddings. A value of 0 would make it infinite. Values below 1e-6 of the largest, which is what
    rounding leaves, count as 1e-6 of it: embeddings along one line have rho 9.4 at S = 64, and none exceeds 13.8.

    Roth et al., ICML 2020, arXiv 2002.08473.

    Args:
        singular_values_S: (S,), the largest above 0; of `singular_values`.

    Returns:
        rho, at least 0 and finite.

    Raises:
        ValueError: no values, or none above 0.
    """
    values_S = torch.as_tensor(singular_values_S, dtype=torch.float64)
    if not len(values_S) or not values_S.max() > 0:
        raise ValueError(f"needs a singular value above 0, got {len(values_S)} values, none above 0")
    shares_S = values_S.clamp(min=RESOLUTION * float(values_S.max()))
    shares_S = shares_S / shares_S.sum()
    return max(0.0, -float(shares_S.mul(len(shares_S)).log().mean()))


def _in_float64(rows_ND: Tensor) -> Iterator[Tensor]:
    # Unit rows of float32 are off by 1e-7; the closed forms take their length to be 1.
    for part_BD in rows_ND.split(CHUNK):
        yield torch.nn.functional.normalize(part_BD.double(), dim=1)
