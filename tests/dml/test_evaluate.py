"""From a dataset to one flat dict of metrics."""

import numpy as np
import pytest
import torch

from dml import encoders, evaluate, recipes
from dml.config import EvaluateConfig
from dml.data import datasets
from dml.data.imageset import ImageSet
from dml.metrics import space

CONFIG = recipes.digits("short")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits() -> datasets.Splits:
    return datasets.load(CONFIG.data)


@pytest.fixture(scope="module")
def encoder() -> encoders.Encoder:
    torch.manual_seed(0)
    return encoders.build(CONFIG.encoder, channels=1, image_size=CONFIG.data.image_size)


def test_images_are_embedded_in_order_whatever_the_batch(splits: datasets.Splits, encoder: encoders.Encoder) -> None:
    whole = evaluate.embed(encoder, splits.val, CONFIG, device=CPU)
    pieces = evaluate.embed(encoder, splits.val, CONFIG.replace(**{"evaluate.batch": 7}), device=CPU)
    assert whole.shape == (len(splits.val), CONFIG.encoder.dim)
    torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-5)
    assert encoder.training, "evaluation leaves the mode as it was"


def test_every_figure_is_there_under_its_prefix(splits: datasets.Splits, encoder: encoders.Encoder) -> None:
    metrics = evaluate.evaluate(encoder, splits.val, CONFIG, device=CPU, prefix="val")
    assert set(metrics) == {f"val/{name}" for name in evaluate.MEASURES}
    assert metrics["val/sqrt_opis"] == pytest.approx(metrics["val/opis"] ** 0.5)
    assert metrics["val/score"] == pytest.approx(metrics["val/recall@1"] - metrics["val/sqrt_opis"])


def test_the_score_weighs_opis_as_configured(splits: datasets.Splits, encoder: encoders.Encoder) -> None:
    config = CONFIG.replace(**{"evaluate.score_weight": 3.0})
    metrics = evaluate.evaluate(encoder, splits.val, config, device=CPU, prefix="v")
    assert metrics["v/score"] == pytest.approx(metrics["v/recall@1"] - 3 * metrics["v/sqrt_opis"])


def test_collapsed_embeddings_get_the_worst_figures_not_the_best() -> None:
    labels = torch.arange(40) % 8
    metrics = evaluate.measure(torch.ones(40, 4), labels, EvaluateConfig())
    assert {name: metrics[name] for name in evaluate.COLLAPSED} == evaluate.COLLAPSED
    assert metrics["score"] <= 1 - 0.5


def test_too_few_pairs_for_the_range_are_an_error_not_a_collapse(splits: datasets.Splits) -> None:
    labels = torch.tensor([0, 0, 1, 1])
    assert evaluate.negative_pairs(labels) == 4
    with pytest.raises(ValueError, match=r"FAR 0[.]01 cannot be reached"):
        evaluate.measure(torch.randn(4, 3), labels, EvaluateConfig())
    with pytest.raises(datasets.DataError, match=r"far_min 1e-09 cannot be told from 0 with the \d+ negative pairs"):
        evaluate.check(splits.val, EvaluateConfig(far_min=1e-9))


def test_queries_with_too_few_gallery_items_are_an_error_whatever_there_is_among_the_queries() -> None:
    """24 queries of 6 classes, an item of 5 of them: 100 negatives, of which the queries alone have 240."""
    queries, gallery = torch.arange(24) % 6, torch.arange(5)
    rows, config = torch.eye(6), EvaluateConfig(far_min=0.005)
    with pytest.raises(ValueError, match=r"FAR 0[.]005 cannot be reached: 100 negative pairs"):
        evaluate.curves(rows[queries], queries, config, gallery=(rows[gallery], gallery))
    ones = torch.ones(100, 6)
    many = torch.arange(100) % 6
    assert evaluate.curves(ones[:24], queries, config, gallery=(ones, many)) is None, "collapsed"


def test_the_sample_of_train_is_the_same_in_the_whole_run_and_shares_its_places_out(splits: datasets.Splits) -> None:
    data = splits.train
    config = CONFIG.replace(**{"evaluate.train_images": 100})
    sample = evaluate.train_sample(data, config)
    sizes = np.bincount(sample.labels_N)
    assert (len(sample), len(sizes), sizes.max()) == (100, 6, 17), "each class has its share, rounded up"
    assert np.array_equal(sample.rows_N, evaluate.train_sample(data, config).rows_N)
    assert not np.array_equal(sample.rows_N, evaluate.train_sample(data, config.replace(**{"train.seed": 1})).rows_N)
    known = dict(zip(data.rows_N.tolist(), data.labels_N.tolist(), strict=True))
    for row, label in zip(sample.rows_N.tolist(), sample.labels_N.tolist(), strict=True):
        assert data.classes[known[row]] == sample.classes[label]
    everything = evaluate.train_sample(data, CONFIG.replace(**{"evaluate.train_images": 10**6}))
    assert sorted(everything.rows_N) == sorted(data.rows_N)


def test_of_many_classes_the_sample_takes_some_with_enough_images_each(splits: datasets.Splits) -> None:
    """As if every twelve images were a class of their own."""
    data = splits.train
    labels = np.arange(len(data)) // 12
    many = ImageSet(labels, tuple(map(str, range(labels.max() + 1))), data.source, data.rows_N)
    sample = evaluate.train_sample(many, CONFIG.replace(**{"evaluate.train_images": 160}))
    assert np.bincount(sample.labels_N).tolist() == [evaluate.SAMPLE_PER_CLASS] * 20


def test_the_space_of_the_sample_is_that_of_its_embeddings(splits: datasets.Splits, encoder: encoders.Encoder) -> None:
    sample = evaluate.train_sample(splits.train, CONFIG)
    found = evaluate.space_of(encoder, sample, CONFIG, device=CPU)
    embeddings = evaluate.embed(encoder, sample, CONFIG, device=CPU)
    expected = space.space(embeddings, torch.from_numpy(sample.labels_N))
    assert found == {f"train/{name}": value for name, value in expected.items()}
    assert set(found) == {"train/pi_intra", "train/pi_inter", "train/pi_ratio", "train/spectral_decay"}


def test_a_sample_that_has_no_space_is_left_out(splits: datasets.Splits, encoder: encoders.Encoder) -> None:
    data = splits.train
    one_class = data.subset(np.flatnonzero(data.labels_N == 2))
    one_image_each = data.subset(np.unique(data.labels_N, return_index=True)[1])
    nothing = evaluate.train_sample(data, CONFIG.replace(**{"evaluate.train_images": 0}))
    assert (len(one_class.classes), len(one_image_each), len(nothing)) == (1, 6, 0)
    for sample in (one_class, one_image_each, nothing):
        assert evaluate.space_of(encoder, sample, CONFIG, device=CPU) == {}


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_bounding_similarities_are_those_of_the_sorted_pairs(distance: str) -> None:
    """The oracle sorts all pairs: so many negatives lie at or above a bound, and so many positives below one."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 12
    embeddings = torch.nn.functional.normalize(
        torch.randn(60, 8, dtype=torch.float64) + 2 * torch.eye(12, 8)[labels], dim=1
    )
    config = EvaluateConfig.model_validate({"far_min": 0.02, "far_max": 0.2, "distance": distance})
    metrics = evaluate.measure(embeddings, labels, config)
    pairs = [(i, j) for i in range(60) for j in range(i)]
    similarity = {pair: float(embeddings[pair[0]] @ embeddings[pair[1]]) for pair in pairs}
    negatives = sorted((s for (i, j), s in similarity.items() if labels[i] != labels[j]), reverse=True)
    positives = sorted(s for (i, j), s in similarity.items() if labels[i] == labels[j])
    for name, bound in (("far_min", 0.02), ("far_max", 0.2)):
        expected = negatives[int(bound * len(negatives)) - 1]
        assert metrics[f"similarity_at_{name}"] == pytest.approx(expected, abs=2e-6)
    assert metrics["similarity_at_frr_max"] == pytest.approx(positives[int(0.2 * len(positives))], abs=2e-6)


def test_bounding_similarities_where_nothing_can_be_told_apart() -> None:
    collapsed = evaluate.measure(torch.ones(40, 4), torch.arange(40) % 8, EvaluateConfig())
    names = ("similarity_at_far_min", "similarity_at_far_max", "similarity_at_frr_max")
    assert [collapsed[name] for name in names] == pytest.approx([1, 1, 1], abs=2e-6)
    torch.manual_seed(0)
    embeddings, labels = torch.randn(30, 4), torch.tensor([0, 0, *range(1, 29)])
    metrics = evaluate.measure(embeddings, labels, EvaluateConfig())
    only = float(torch.nn.functional.cosine_similarity(embeddings[0], embeddings[1], dim=0))
    assert metrics["similarity_at_frr_max"] == pytest.approx(only, abs=2e-6), "one positive: the least of them"
