"""What every sampler in SAMPLERS must satisfy. A new one inherits SamplerContract and gives its `name`."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from dml.config import BatchConfig
from dml.data import sampler
from dml.data.sampler import Embed, Indices

SIZES = [2, 3, 5, 8, 8, 9, 12, 20, 4, 7]


def labels_of(sizes: list[int]) -> Indices:
    """Labels in a scattered order, as a dataset may bring them."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return labels[np.random.default_rng(0).permutation(len(labels))]


def embedder(labels_N: Indices, *, dim: int = 8, seed: int = 0) -> Embed:
    """Unit embeddings scattered around a mean for each class, as an encoder gives them."""
    generator = np.random.default_rng(seed)
    means_CD = generator.normal(size=(int(labels_N.max()) + 1, dim))
    rows_ND = means_CD[labels_N] + 0.5 * generator.normal(size=(len(labels_N), dim))
    unit = torch.nn.functional.normalize(torch.from_numpy(rows_ND).float(), dim=1)

    def embed(indices: Indices) -> Tensor:
        return unit[torch.from_numpy(indices)]

    return embed


class SamplerContract:
    """Subclasses give the sampler's name; `grouped` is False where a batch is no P classes x K samples."""

    name: str
    grouped = True

    def plan(self, labels_N: Indices, *, seed: int = 0, epoch: int = 0, steps: int = 6, **settings: object) -> Indices:
        batch = BatchConfig.model_validate({"classes": 4, "samples": 3, "sampler": self.name, **settings})
        return sampler.plan(labels_N, batch, seed=seed, epoch=epoch, steps=steps, embed=embedder(labels_N))

    @pytest.mark.parametrize(("classes", "samples"), [(4, 3), (2, 2), (10, 4), (3, 8)])
    def test_every_batch_holds_the_images_asked_for(self, classes: int, samples: int) -> None:
        labels = labels_of(SIZES)
        plan = self.plan(labels, classes=classes, samples=samples)
        assert plan.dtype == np.int64
        assert plan.shape == (6, classes * samples)
        assert plan.min() >= 0
        assert plan.max() < len(labels)
        for row in plan:
            most = Counter(row.tolist()).most_common(1)[0][1]
            assert most <= (-(-samples // min(SIZES)) if self.grouped else 1)
            if not self.grouped:
                continue
            groups = labels[row].reshape(classes, samples)
            assert (groups == groups[:, :1]).all(), "the samples of a class lie side by side"
            assert len(set(groups[:, 0].tolist())) == classes
            for members in row.reshape(classes, samples):
                available = SIZES[labels[members[0]]]
                repeats = Counter(members.tolist())
                assert len(repeats) == min(samples, available), "none repeats unless the class is too small"
                assert max(repeats.values()) == -(-samples // available), "and then evenly"

    def test_the_same_key_plans_the_same_and_another_does_not(self) -> None:
        labels = labels_of(SIZES)
        keys = [(0, 0), (0, 1), (1, 0), (-1, 7)]
        plans = {self.plan(labels, seed=seed, epoch=epoch).tobytes() for seed, epoch in keys}
        again = {self.plan(labels, seed=seed, epoch=epoch).tobytes() for seed, epoch in keys}
        assert len(plans) == 4
        assert again == plans

    def test_steps_differ(self) -> None:
        plan = self.plan(labels_of(SIZES), steps=20)
        assert len({frozenset(row.tolist()) for row in plan}) > 15

    def test_no_steps_are_an_empty_plan(self) -> None:
        assert self.plan(labels_of(SIZES), steps=0).shape == (0, 12)

    @pytest.mark.parametrize("world", [2, 3, 5])
    def test_the_ranks_slices_in_order_are_the_global_batch(self, world: int) -> None:
        for row in self.plan(labels_of(SIZES), steps=2):
            slices = [sampler.rank_slice(row, rank, world) for rank in range(world)]
            np.testing.assert_array_equal(np.concatenate(slices), row)
            assert max(map(len, slices)) - min(map(len, slices)) <= 1

    def test_more_images_than_there_are_classes_for_are_refused(self) -> None:
        few = labels_of([4, 4, 3])
        message = r"batch\.classes is 4, but there are 3 classes" if self.grouped else "4 x 3 images, but there are 11"
        with pytest.raises(ValueError, match=message):
            self.plan(few)

    def test_small_classes_are_refused_on_request(self) -> None:
        labels = labels_of(SIZES)
        assert self.plan(labels, samples=2, small_classes="refuse").shape == (6, 8)
        if self.grouped:
            with pytest.raises(
                ValueError, match=r"3 of 10 classes have fewer .* 5 images, such as class 0 with 2; valid"
            ):
                self.plan(labels, samples=5, small_classes="refuse")


class PlainContract(SamplerContract):
    """Samplers that know nothing of the encoder."""

    def test_a_step_does_not_depend_on_how_many_follow(self) -> None:
        labels = labels_of(SIZES)
        np.testing.assert_array_equal(self.plan(labels, steps=4), self.plan(labels, steps=30)[:4])

    def test_no_embedding_is_asked_for(self) -> None:
        assert self.name not in sampler.EMBEDDING_DRIVEN


class EmbeddingContract(SamplerContract):
    """Samplers that choose by embeddings among `candidates` batches a step."""

    def test_the_embeddings_decide(self) -> None:
        labels = labels_of(SIZES)
        batch = BatchConfig(classes=4, samples=3, sampler=self.name)
        plans = {
            sampler.plan(labels, batch, seed=0, epoch=0, steps=9, embed=embedder(labels, seed=seed)).tobytes()
            for seed in range(3)
        }
        assert len(plans) == 3

    def test_each_candidate_is_embedded_once(self) -> None:
        labels = labels_of(SIZES)
        asked: list[Indices] = []
        embed = embedder(labels)

        def recording(indices: Indices) -> Tensor:
            asked.append(indices)
            return embed(indices)

        batch = BatchConfig(classes=2, samples=2, sampler=self.name, candidates=3)
        plan = sampler.plan(labels, batch, seed=0, epoch=0, steps=2, embed=recording)
        (candidates,) = asked
        assert len(set(candidates.tolist())) == len(candidates) <= 2 * 2 * 3 * 2
        assert set(plan.ravel().tolist()) <= set(candidates.tolist())

    def test_embeddings_that_all_coincide_still_make_batches(self) -> None:
        labels = labels_of(SIZES)
        batch = BatchConfig(classes=4, samples=3, sampler=self.name)
        plan = sampler.plan(
            labels, batch, seed=0, epoch=0, steps=5, embed=lambda indices: torch.eye(8)[:1].expand(len(indices), 8)
        )
        assert all(len(set(labels[row].tolist())) == 4 for row in plan)

    def test_a_plan_without_embeddings_is_refused(self) -> None:
        labels = labels_of(SIZES)
        with pytest.raises(ValueError, match=f"{self.name} chooses by embeddings: plan needs embed"):
            sampler.plan(labels, BatchConfig(classes=2, sampler=self.name), seed=0, epoch=0, steps=1)
