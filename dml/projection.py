"""Embeddings in two dimensions, to be looked at."""

import numpy as np
import numpy.typing as npt
import torch

from dml.metrics.inputs import Array, Floats, unit_rows

LIMIT = 2000
"""Samples that t-SNE takes about six seconds of one core for; its time grows a little faster than their number."""
CLASSES = 20
"""A class may fill this part of the limit: one large class must leave room for others."""
PERPLEXITY = 30.0
_FEWEST = 8


def project(
    embeddings_ND: Array, labels_N: Array, *, seed: int = 0, limit: int = LIMIT
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Lay a seeded sample of whole classes out on a plane by t-SNE, so that near neighbours stay near.

    By cosine distance, from a PCA start, on one thread (several wait for each other longer than they help). A handful
    of samples, or samples all alike, are laid out by PCA alone.

    van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 9, 2008.

    Args:
        embeddings_ND: (N, D) floats, NumPy or torch; rows are normalised.
        labels_N: (N,) integers.
        seed: of the sample and of the layout.
        limit: samples at most. Where there are more: whole classes in a seeded order while they fit, of each
            limit / min(C, 20) samples at most.

    Returns:
        ids (M,) int64 ascending, rows of the embeddings, and points (M, 2) float64.

    Raises:
        ValueError: bad input (see `dml.metrics.inputs.unit_rows`), or a limit below 2.
    """
    if limit < 2:
        raise ValueError(f"limit must be at least 2, got {limit}")
    rows_ND, labels = unit_rows(embeddings_ND, labels_N)
    ids_M = _sample(labels.cpu().numpy(), limit, np.random.default_rng(seed))
    rows_MD = rows_ND[torch.from_numpy(ids_M).to(rows_ND.device)].double().cpu().numpy()
    start_M2 = _principal(rows_MD)
    if len(ids_M) < _FEWEST or not start_M2[:, 0].std() > 0:
        return ids_M, start_M2
    return ids_M, _tsne(rows_MD, start_M2, seed)


def _sample(labels_N: npt.NDArray[np.int64], limit: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    if len(labels_N) <= limit:
        return np.arange(len(labels_N))
    order_N = rng.permutation(len(labels_N))
    order_N = order_N[np.argsort(labels_N[order_N], kind="stable")]
    members = np.split(order_N, np.flatnonzero(np.diff(labels_N[order_N])) + 1)
    most, room, chosen = max(1, limit // min(len(members), CLASSES)), limit, []
    for which in rng.permutation(len(members)):
        part = members[which][:most]
        if len(part) <= room:
            chosen.append(part)
            room -= len(part)
    return np.sort(np.concatenate(chosen))


def _principal(rows_MD: Floats) -> Floats:
    """The two directions of most variance, the larger scaled to the 1e-4 that t-SNE likes to start from."""
    centred_MD = rows_MD - rows_MD.mean(axis=0)
    u, values, _ = np.linalg.svd(centred_MD, full_matrices=False)
    points_M2 = np.zeros((len(rows_MD), 2))
    kept = min(2, len(values))
    points_M2[:, :kept] = u[:, :kept] * values[:kept] * (values[:kept] > 1e-6)
    return points_M2


def _tsne(rows_MD: Floats, start_M2: Floats, seed: int) -> Floats:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    layout = TSNE(
        metric="cosine",
        init=start_M2 / start_M2[:, 0].std() * 1e-4,
        perplexity=min(PERPLEXITY, (len(rows_MD) - 1) / 3),
        random_state=seed,
    )
    with threadpool_limits(1):
        return np.asarray(layout.fit_transform(rows_MD.astype(np.float32)), dtype=np.float64)
