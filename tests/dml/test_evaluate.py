"""From a dataset to one flat dict of metrics."""

import pytest
import torch

from dml import encoders, evaluate, recipes
from dml.config import EvaluateConfig
from dml.data import datasets

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
