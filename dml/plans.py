"""The global batches of each epoch of a training, by its sampler and, where that asks for it, its encoder."""

import dataclasses

import torch
from torch import Tensor

from dml import evaluate as evaluation
from dml import gather
from dml.config import Config
from dml.data import sampler
from dml.data.imageset import ImageSet
from dml.data.sampler import Indices
from dml.encoders import Encoder


class Plans:
    """Plans epochs, the same on every rank.

    An embedding-driven sampler costs one evaluation-mode forward pass over its candidates, which are the whole training
    set in an epoch of full length, every `batch.embed_every` epochs, shared out over ranks; then it plans that many
    epochs at once.

    Args:
        encoder: the one in training; read when an epoch is asked for.
        data: the training split.
        config: everything about the run.
        steps: global batches of an epoch.
        device: where the encoder lies.
        group: ranks that train together.
    """

    def __init__(
        self,
        encoder: Encoder,
        data: ImageSet,
        config: Config,
        steps: int,
        *,
        device: torch.device,
        group: gather.Group | None,
    ) -> None:
        self.encoder, self.data, self.config, self.steps = encoder, data, config, steps
        self.device, self.group = device, group
        self._span: int | None = None
        self.stored: Indices | None = None
        """int64 (embed_every * steps, P * K): all planned batches of an embedding-driven sampler, for the checkpoint;
        None of a plain one, whose plan follows from the seed."""

    def epoch(self, number: int) -> Indices:
        """The batches of an epoch, counted from 0: int64 (steps, P * K). A collective.

        Raises:
            ArithmeticError: the encoder's embeddings are not finite.
            ValueError: as `sampler.check`.
        """
        batch, seed = self.config.batch, self.config.train.seed
        if batch.sampler not in sampler.EMBEDDING_DRIVEN:
            return sampler.plan(self.data.labels_N, batch, seed=seed, epoch=number, steps=self.steps)
        span, place = divmod(number, batch.embed_every)
        if span != self._span or self.stored is None:
            steps = self.steps * batch.embed_every
            self.stored = sampler.plan(
                self.data.labels_N, batch, seed=seed, epoch=span, steps=steps, embed=self._embed, group=self.group
            )
            self._span = span
        return self.stored[place * self.steps : (place + 1) * self.steps]

    def restore(self, stored: Indices, number: int) -> None:
        """Takes up the stored plan of a checkpoint that was written in or after this epoch, counted from 0.

        Raises:
            ValueError: a plan of another shape than this config's.
        """
        batch = self.config.batch
        expected = (self.steps * batch.embed_every, batch.size)
        if stored.shape != expected:
            raise ValueError(f"the stored plan has shape {stored.shape}, but this config plans {expected}")
        self.stored, self._span = stored, number // batch.embed_every

    def _embed(self, indices: Indices) -> Tensor:
        data = self.data
        candidates = dataclasses.replace(data, labels_N=data.labels_N[indices], rows_N=data.rows_N[indices])
        rows_MD = evaluation.embed(self.encoder, candidates, self.config, device=self.device, group=self.group)
        broken = int((~torch.isfinite(rows_MD)).any(dim=1).sum())
        if broken:
            raise ArithmeticError(
                f"{broken} of {len(rows_MD)} training images have embeddings that are NaN or infinite, so "
                f"batch.sampler {self.config.batch.sampler} cannot choose. A lower optim.lr or optim.clip usually helps"
            )
        return rows_MD
