import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dml.config import BatchConfig, Config, DataConfig, EvaluateConfig
from dml.data import imageset, loader, sampler
from dml.data.datasets import DataError, ImageSet, load
from dml.data.images import augment, normalise, to_input

BATCH = BatchConfig(classes=3, samples=3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight classes of five photographs of different sizes."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in range(8):
        (root / f"class {name}").mkdir()
        for number in range(5):
            pixels = generator.integers(0, 256, (20 + number, 30 - name, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class {name}" / f"{number}.png")
    return root


@pytest.fixture(params=["memory", "files"])
def config(request: pytest.FixtureRequest, photos: Path) -> Config:
    if request.param == "memory":
        return Config(data=DataConfig(dataset="digits", image_size=16), batch=BATCH, evaluate=EvaluateConfig(batch=50))
    data = DataConfig(dataset="image_folder", root=str(photos), channels=3, image_size=16, augment="crop")
    return Config(data=data, batch=BATCH, evaluate=EvaluateConfig(batch=4))


@pytest.fixture
def train(config: Config) -> ImageSet:
    return load(config.data).train


def plan_of(train: ImageSet, *, epoch: int = 0, steps: int) -> sampler.Indices:
    return sampler.plan(train.labels_N, BATCH, seed=0, epoch=epoch, steps=steps)


def test_a_batch_is_the_plans_step_augmented_and_labelled(config: Config, train: ImageSet) -> None:
    plan = plan_of(train, epoch=2, steps=4)
    made = list(loader.batches(train, config, plan, epoch=2))
    assert len(made) == 4
    for batch, chosen in zip(made, plan, strict=True):
        assert batch.indices.tolist() == chosen.tolist()
        assert batch.labels.tolist() == train.labels_N[chosen].tolist()
        expected = augment(train.images(chosen), config.data, seed=0, epoch=2, indices=chosen)
        assert torch.equal(normalise(batch.images, config.data), expected)


def test_an_epoch_is_resumed_at_a_step_with_the_rest_of_its_plan(config: Config, train: ImageSet) -> None:
    plan = plan_of(train, epoch=1, steps=5)
    whole = list(loader.batches(train, config, plan, epoch=1))
    rest = list(loader.batches(train, config, plan[3:], epoch=1))
    assert len(rest) == 2
    for batch, expected in zip(rest, whole[3:], strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.labels, expected.labels)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_ranks_batches_in_order_are_the_global_batch(world: int, config: Config, train: ImageSet) -> None:
    plan = plan_of(train, steps=3)
    whole = list(loader.batches(train, config, plan, epoch=0))
    shares = [list(loader.batches(train, config, plan, epoch=0, rank=r, world=world)) for r in range(world)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([share[step].images for share in shares]), batch.images)
        assert torch.equal(torch.cat([share[step].labels for share in shares]), batch.labels)


def test_evaluation_batches_are_the_rows_in_order(config: Config) -> None:
    val = load(config.data).val
    made = list(loader.eval_batches(val, config))
    assert [len(batch.labels) for batch in made[:-1]] == [config.evaluate.batch] * (len(made) - 1)
    assert torch.cat([batch.indices for batch in made]).tolist() == list(range(len(val)))
    inputs = torch.cat([normalise(batch.images, config.data) for batch in made])
    assert torch.equal(inputs, to_input(val.images(range(len(val))), config.data))


def test_a_rank_without_rows_gets_no_batch(config: Config) -> None:
    val = load(config.data).val
    assert list(loader.eval_batches(val, config, rank=0, world=len(val) + 1)) == []


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("dml-images")]


def test_the_reading_thread_ends_with_the_iterator(config: Config, train: ImageSet) -> None:
    iterator = loader.batches(train, config, plan_of(train, steps=1000), epoch=0)
    next(iterator)
    assert bool(reading_threads()) == (config.data.dataset == "image_folder")
    iterator.close()
    assert reading_threads() == []
    list(loader.batches(train, config, plan_of(train, steps=2), epoch=0))
    assert reading_threads() == []


def test_a_file_that_turns_bad_ends_the_iteration_with_its_name(photos: Path, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(photos, root)
    config = Config(data=DataConfig(dataset="image_folder", root=str(root), channels=3, image_size=16), batch=BATCH)
    train = load(config.data).train
    for file in (root / train.classes[0]).iterdir():
        file.write_bytes(b"overwritten")
    with pytest.raises(DataError, match=f"class '{train.classes[0]}': .* not an image in a known format"):
        list(loader.batches(train, config, plan_of(train, steps=20), epoch=0))
    assert reading_threads() == []


def test_batches_are_made_ahead_of_the_reader_but_not_without_bound(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(dataset="image_folder", root=str(photos), channels=3, image_size=16, augment="crop", threads=2)
    train = load(data).train
    decoded: list[Path] = []
    third = threading.Event()
    decode = imageset.decode

    def counted(path: Path, channels: int, *, enough: int | None) -> torch.Tensor:
        decoded.append(path)
        if len(decoded) == 3 * BATCH.size:
            third.set()
        return decode(path, channels, enough=enough)

    monkeypatch.setattr(imageset, "decode", counted)
    iterator = loader.batches(train, Config(data=data, batch=BATCH), plan_of(train, steps=50), epoch=0)
    next(iterator)
    assert third.wait(20), "made while nobody asks"
    assert len(decoded) == 3 * BATCH.size, "and then no more"
    assert sum(1 for _ in iterator) == 49
    assert len(decoded) == 50 * BATCH.size


def test_as_many_threads_decode_as_the_rank_has_cpus_and_none_computes_on_more(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(dataset="image_folder", root=str(photos), channels=3, image_size=16)
    train = load(data).train
    seen: dict[str, int] = {}
    decode = imageset.decode

    def noted(path: Path, channels: int, *, enough: int | None) -> torch.Tensor:
        seen[threading.current_thread().name] = torch.get_num_threads()
        return decode(path, channels, enough=enough)

    monkeypatch.setattr(imageset, "decode", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(loader.batches(train, Config(data=data, batch=BATCH), plan_of(train, steps=20), epoch=0))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert 1 < len(seen) <= 3
    assert set(seen.values()) == {1}
