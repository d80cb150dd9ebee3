import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dml.config import BatchConfig, DataConfig
from dml.data import datasets
from dml.data.datasets import DataError, load
from tests.contracts.dataset_contract import DatasetContract


def folder_of(root: Path, sizes: dict[str, int]) -> Path:
    """A folder a class, its images all different."""
    for number, (name, size) in enumerate(sizes.items()):
        (root / name).mkdir(parents=True)
        for sample in range(size):
            Image.new("RGB", (20 + sample, 16), (number * 20, sample * 30, 128)).save(root / name / f"{sample}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("photos"), {f"class {letter}": 3 for letter in "abcdefghij"})


class TestDigitsContract(DatasetContract):
    @pytest.fixture(params=[(16, 1), (32, 3)], ids=["16 gray", "32 rgb"])
    def config(self, request: pytest.FixtureRequest) -> DataConfig:
        size, channels = request.param
        return DataConfig(dataset="digits", image_size=size, channels=channels)


class TestImageFolderContract(DatasetContract):
    @pytest.fixture(params=["crop", "affine"])
    def config(self, request: pytest.FixtureRequest, photos: Path) -> DataConfig:
        return DataConfig.model_validate(
            {"dataset": "image_folder", "root": str(photos), "channels": 3, "image_size": 8, "augment": request.param}
        )


class TestSplitCsvContract(DatasetContract):
    @pytest.fixture
    def config(self, photos: Path, tmp_path: Path) -> DataConfig:
        split_of = dict(zip("abcdefghij", ["train"] * 6 + ["val"] * 2 + ["test"] * 2, strict=True))
        rows = [f"class {name}/{i}.png,class {name},{split}" for name, split in split_of.items() for i in range(3)]
        (tmp_path / "split.csv").write_text("\n".join(["path,label,split", *rows]))
        return DataConfig(dataset="image_folder", root=str(photos), split_csv=str(tmp_path / "split.csv"))


def test_digits_are_all_there_and_a_toy() -> None:
    splits = load(DataConfig(dataset="digits", image_size=8))
    assert splits.toy
    assert len(splits.train) + len(splits.val) + len(splits.test) == 1797
    assert [len(part.classes) for part in (splits.train, splits.val, splits.test)] == [6, 2, 2]
    from sklearn.datasets import load_digits

    original = load_digits()
    digit = int(splits.val.classes[0].split()[-1])
    expected = np.rint(original.images[original.target == digit] * 255 / 16)
    found = splits.val.images(np.flatnonzero(splits.val.labels_N == 0))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found[:, 0].numpy(), expected)


def test_loading_is_done_once_for_equal_settings() -> None:
    assert load(DataConfig(dataset="digits")) is load(DataConfig(dataset="digits"))


def test_an_unknown_dataset_is_named_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown dataset 'glyph'; valid: glyphs, digits, image_folder"):
        load(DataConfig(dataset="glyph"))


def test_classes_with_one_image_are_set_aside_with_a_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {f"pair {n}": 2 for n in range(8)} | {"single a": 1, "single b": 1}
    with caplog.at_level(logging.WARNING):
        splits = load(DataConfig(dataset="image_folder", root=str(folder_of(tmp_path / "images", sizes))))
    assert splits.set_aside == 2
    assert "2 of 10 classes have a single sample and are set aside" in caplog.text
    used = [name for part in (splits.train, splits.val, splits.test) for name in part.classes]
    assert sorted(used) == [f"pair {n}" for n in range(8)]
    with pytest.raises(DataError, match=r"only 4 classes can be trained on \(2 classes with a single image were set"):
        datasets.check(splits, BatchConfig(classes=5, samples=2))


def test_single_images_do_not_change_the_split_of_the_others(tmp_path: Path) -> None:
    pairs = {f"pair {n}": 2 for n in range(8)}
    without = load(DataConfig(dataset="image_folder", root=str(folder_of(tmp_path / "a", pairs))))
    with_one = load(DataConfig(dataset="image_folder", root=str(folder_of(tmp_path / "b", pairs | {"single": 1}))))
    assert with_one.test.classes == without.test.classes


def test_the_fingerprint_follows_names_split_and_samples(tmp_path: Path) -> None:
    sizes = {f"class {n}": 3 for n in range(6)}
    one = load(DataConfig(dataset="image_folder", root=str(folder_of(tmp_path / "one", sizes))))
    moved = load(DataConfig(dataset="image_folder", root=str(folder_of(tmp_path / "two", sizes))))
    assert one.fingerprint == moved.fingerprint, "where the folder lies does not matter"
    prints = {one.fingerprint}
    (tmp_path / "one" / "class 0" / "0.png").rename(tmp_path / "one" / "class 0" / "9.png")
    (tmp_path / "two" / "class 0").rename(tmp_path / "two" / "other")
    for root in ("one", "two"):
        load.cache_clear()
        prints.add(load(DataConfig(dataset="image_folder", root=str(tmp_path / root))).fingerprint)
    prints.add(load(DataConfig(dataset="image_folder", root=str(tmp_path / "two"), test_fraction=0.5)).fingerprint)
    assert len(prints) == 4


def test_val_classes_that_train_leave_test_and_fingerprint_alone(tmp_path: Path) -> None:
    root = str(folder_of(tmp_path, {f"class {n}": 3 for n in range(16)}))
    config = DataConfig(dataset="image_folder", root=root)
    searched, final = load(config), load(config.model_copy(update={"train_on_val": 0.5}))
    assert final.fingerprint == searched.fingerprint
    assert final.test.classes == searched.test.classes
    assert set(final.val.classes) < set(searched.val.classes)
    assert set(final.train.classes) == {*searched.train.classes, *searched.val.classes} - {*final.val.classes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_fraction": 0.0}, r"the test split is empty: of 10 classes .* train has 8, val has 2"),
        ({"val_fraction": 0.0}, r"the val split is empty"),
        ({"test_fraction": 1.0}, r"the val split is empty: .* train has 2, test has 8"),
    ],
)
def test_an_empty_split_is_named_with_what_there_is(changes: dict[str, float], message: str) -> None:
    splits = load(DataConfig.model_validate({"dataset": "digits", "image_size": 8, **changes}))
    with pytest.raises(DataError, match=message):
        datasets.check(splits, BatchConfig(classes=2, samples=2))


def test_a_split_with_one_class_has_no_negatives() -> None:
    splits = load(DataConfig(dataset="digits", image_size=8))
    lonely = dataclasses.replace(splits.val, labels_N=splits.val.labels_N[:9] * 0, classes=splits.val.classes[:1])
    with pytest.raises(DataError, match="the val split has a single class"):
        datasets.check(dataclasses.replace(splits, val=lonely), BatchConfig(classes=2, samples=2))


def test_too_few_classes_or_images_name_the_limit() -> None:
    splits = load(DataConfig(dataset="digits", image_size=8))
    with pytest.raises(DataError, match=r"batch\.classes is 32, but only 6 classes can be trained on; valid: 2 to 6"):
        datasets.check(splits, BatchConfig(classes=32))
    counts_C = np.bincount(splits.train.labels_N)
    largest = splits.train.classes[int(counts_C.argmax())]
    with pytest.raises(DataError, match=f"the largest, '{largest}', has {counts_C.max()} images"):
        datasets.check(splits, BatchConfig(classes=2, samples=500))
    datasets.check(splits, BatchConfig(classes=6, samples=int(counts_C.max())))


def test_what_the_sampler_refuses_is_refused_with_the_classs_name() -> None:
    splits = load(DataConfig(dataset="digits", image_size=8))
    counts_C = np.bincount(splits.train.labels_N)
    smallest = splits.train.classes[int(counts_C.argmin())]
    samples = int(counts_C.min()) + 1
    refusing = BatchConfig(classes=2, samples=samples, small_classes="refuse")
    with pytest.raises(DataError, match=f"batch.samples {samples} images, such as '{smallest}' with {samples - 1}"):
        datasets.check(splits, refusing)
    datasets.check(splits, refusing.model_copy(update={"small_classes": "repeat"}))
    with pytest.raises(DataError, match=r"unknown batch\.sampler 'coreset'; valid: d2_coreset, greedy_coreset, "):
        datasets.check(splits, BatchConfig(classes=2, sampler="coreset"))


def test_a_random_batch_may_be_of_any_size_up_to_the_split() -> None:
    splits = load(DataConfig(dataset="digits", image_size=8))
    datasets.check(splits, BatchConfig(classes=len(splits.train) // 2, samples=2, sampler="random"))
    size = len(splits.train)
    with pytest.raises(DataError, match=f"a batch is 2 x {size} images, but there are {size}; valid"):
        datasets.check(splits, BatchConfig(classes=2, samples=size, sampler="random"))
