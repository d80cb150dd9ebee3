"""Batches beyond memory: the encoder sees a batch in chunks, the loss sees it whole, and the gradient is the plain one.

    1. embeddings e of all chunks, without a graph         activations of one chunk at a time
    2. L(e), gathered over ranks, and g = dL/de            the encoder takes no part
    3. for each chunk: its embeddings again, with a graph, and backward of <e_chunk, g_chunk>

By the chain rule step 3 adds up to the plain gradient: dL/dtheta = sum over chunks of g_chunk * de_chunk/dtheta. The
price is a second forward pass, a third more work.

Gao, Zhang, Han and Callan, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021,
arXiv 2101.06983.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml import draws, encoders

_STREAM = 0x64726F70  # keeps the encoder's draws apart from those of the sampler and the augmentation
Within = Callable[[int], contextlib.AbstractContextManager[None]]
Prepare = Callable[[Tensor], Tensor]


def _as_it_is(images: Tensor) -> Tensor:
    return images


def split(images_B: Tensor, micro_batch: int, largest: int) -> Sequence[Tensor]:
    """A rank's images in chunks of about equal size, as many on every rank, so that their collectives meet.

    Args:
        images_B: (B, ...), B at most largest.
        micro_batch: images of a chunk, at most.
        largest: images of the rank that has most.
    """
    return images_B.tensor_split(-(-largest // micro_batch))


@contextlib.contextmanager
def seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Draws from torch's generators (dropout, stochastic depth) depend on the key alone, and leave no trace.

    Args:
        device: where the draws are made; the CPU's generator is seeded too.
        key: for example (seed, step, rank, chunk).
    """
    seed = int(draws.uniform(_STREAM, *key, rows=[0], count=1)[0, 0] * 2**53)
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # One by one, since torch.manual_seed seeds all GPUs, and only this one's state is put back.
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def embed(encoder: nn.Module, chunks: Sequence[Tensor], within: Within, prepare: Prepare = _as_it_is) -> Tensor:
    """Step 1: the embeddings of all chunks, a leaf whose gradient the loss then leaves.

    BatchNorm in training normalises each chunk by itself; its running statistics move in `backward` only.

    Args:
        encoder: (b, ...) -> (b, D), bare or in DDP.
        chunks: images, moved to the encoder's device one at a time; at least one chunk, which may be empty.
        within: the context of chunk i, the same here and in `backward`: its draws (`seeded`) and precision.
        prepare: what a chunk goes through on the encoder's device, the same here and in `backward`.

    Returns:
        (B, D), without a graph, requiring a gradient.
    """
    # DDP's own forward pass would begin a reduction.
    bare = encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
    parts = []
    with torch.no_grad(), _statistics_kept(bare):
        for index, chunk in enumerate(chunks):
            with within(index):
                parts.append(bare(prepare(_moved(chunk, bare))))
    return torch.cat(parts).requires_grad_()


def backward(
    encoder: nn.Module, chunks: Sequence[Tensor], gradient_BD: Tensor, within: Within, prepare: Prepare = _as_it_is
) -> None:
    """Step 3: adds the gradient of the whole batch to the encoder's parameters; over ranks it is averaged, as by DDP.

    Args:
        encoder: as for `embed`; DDP reduces once, after the last chunk.
        chunks: as for `embed`.
        gradient_BD: the gradient that the loss left at the embeddings (`.grad`).
        within: as for `embed`.
        prepare: as for `embed`.
    """
    start, last = 0, len(chunks) - 1
    for index, chunk in enumerate(chunks):
        waits = isinstance(encoder, DistributedDataParallel) and index < last
        with encoder.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with within(index):
                embeddings_bD = encoder(prepare(_moved(chunk, encoder)))
            embeddings_bD.backward(gradient_BD[start : start + len(chunk)])
        start += len(chunk)


def _moved(chunk: Tensor, encoder: nn.Module) -> Tensor:
    return chunk.to(next(encoder.parameters()).device, non_blocking=True)


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorm in training leaves its running statistics alone; `backward` moves them, and a batch counts once."""
    layers = [layer for layer in encoders.batch_norms(module) if layer.track_running_stats]
    for layer in layers:
        # In evaluation mode the layer reads what it stored, whatever this says.
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
