"""What every dataset promises, whatever it is made of: subclass it and give a config."""

import dataclasses

import numpy as np
import pytest
import torch

from dml.config import BatchConfig, Config, DataConfig
from dml.data import datasets
from dml.data.datasets import Splits
from dml.data.images import Transform, normalise, to_input
from dml.data.loader import eval_batches
from dml.data.splits import SPLITS


class DatasetContract:
    """Inherited by a test class per dataset, which provides the fixture `config`."""

    @pytest.fixture
    def config(self) -> DataConfig:
        raise NotImplementedError

    @pytest.fixture
    def splits(self, config: DataConfig) -> Splits:
        return datasets.load(config)

    def test_splits_have_no_class_in_common(self, splits: Splits) -> None:
        names = [set(getattr(splits, split).classes) for split in SPLITS]
        assert all(names), "every split has classes"
        assert len(set.union(*names)) == sum(map(len, names))

    def test_labels_are_dense_and_every_class_has_a_positive_pair(self, splits: Splits) -> None:
        for split in SPLITS:
            part = getattr(splits, split)
            assert part.labels_N.dtype == np.int64
            assert len(part) == len(part.labels_N)
            counts_C = np.bincount(part.labels_N)
            assert len(counts_C) == len(part.classes)
            assert counts_C.min() >= 2

    def test_images_are_uint8_with_the_channels_asked_for(self, splits: Splits, config: DataConfig) -> None:
        for split in SPLITS:
            part = getattr(splits, split)
            images = part.images([0, len(part) - 1])
            assert len(images) == 2
            assert all(image.dtype == torch.uint8 and image.shape[0] == config.channels for image in images)

    def test_an_image_does_not_depend_on_what_it_is_asked_for_with(self, splits: Splits) -> None:
        last = len(splits.val) - 1
        assert torch.equal(splits.val.images([last])[0], splits.val.images([0, last, 1])[1])

    def test_images_become_inputs_of_the_size_asked_for(self, splits: Splits, config: DataConfig) -> None:
        inputs = to_input(splits.val.images([1, 0]), config)
        assert inputs.shape == (2, config.channels, config.image_size, config.image_size)
        assert inputs.dtype == torch.float32
        assert torch.isfinite(inputs).all()
        through_the_set = next(splits.val.inputs([[1, 0]], Transform(config)))
        assert torch.equal(inputs, normalise(through_the_set, config))

    def test_evaluation_sees_every_row_once_in_order(self, splits: Splits, config: DataConfig) -> None:
        whole = Config(data=config)
        seen = [batch for rank in range(3) for batch in eval_batches(splits.val, whole, rank=rank, world=3)]
        assert torch.cat([batch.indices for batch in seen]).tolist() == list(range(len(splits.val)))
        assert torch.cat([batch.labels for batch in seen]).tolist() == splits.val.labels_N.tolist()

    def test_loading_again_gives_the_same_and_another_seed_does_not(self, splits: Splits, config: DataConfig) -> None:
        datasets.load.cache_clear()
        again = datasets.load(config)
        assert again.fingerprint == splits.fingerprint
        assert again.test.classes == splits.test.classes
        assert torch.equal(again.test.images([0])[0], splits.test.images([0])[0])
        if config.split_csv is None:
            moved = datasets.load(config.model_copy(update={"split_seed": config.split_seed + 1}))
            assert moved.fingerprint != splits.fingerprint

    def test_it_can_be_trained_on(self, splits: Splits) -> None:
        datasets.check(splits, BatchConfig(classes=2, samples=2))

    def test_each_empty_split_is_named(self, splits: Splits) -> None:
        nobody = dataclasses.replace(splits.val, labels_N=np.empty(0, dtype=np.int64), classes=())
        for split in SPLITS:
            with pytest.raises(datasets.DataError, match=f"the {split} split is empty"):
                datasets.check(dataclasses.replace(splits, **{split: nobody}), BatchConfig(classes=2, samples=2))
