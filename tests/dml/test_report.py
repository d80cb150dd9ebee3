"""Everything measured at once agrees with each measure by itself, and is drawn."""

import json

import numpy as np
import pytest
import torch

from dml import evaluate, report
from dml.config import EvaluateConfig
from dml.metrics import clustering, retrieval, space, threshold
from dml.metrics.labelled_pairs import LabelledPairs
from dml.metrics.operating_points import calibrate

CONFIG = EvaluateConfig(far_min=0.05, far_max=0.3, thresholds=21)


def subject(classes=14, samples=7, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(samples)
    centres = torch.randn(classes, 8, generator=generator)
    rows = centres[labels] + 0.6 * torch.randn(len(labels), 8, generator=generator)
    return report.Subject(rows, labels, tuple(f"class {c}" for c in range(classes)), **more)


def pictures(rows):
    return [np.full((6, 5), 20 * (row % 10), dtype=np.uint8) for row in rows.tolist()]


@pytest.fixture(scope="module")
def whole():
    return subject(images=pictures)


@pytest.fixture(scope="module")
def found(whole):
    known = subject(seed=1)
    points = calibrate(known.embeddings_ND, known.labels_N, far=(0.1, 0.02))
    return report.measure(whole, CONFIG, points=points)


def test_every_part_says_what_it_says_by_itself(whole, found):
    rows, labels = whole.embeddings_ND, whole.labels_N
    curves = threshold.threshold_curves(rows, labels, far_range=(0.05, 0.3), num_thresholds=21)
    alone = (
        retrieval.retrieval(rows, labels).means()
        | evaluate.consistency(curves, 1.0)
        | clustering.clustering(rows, labels)
        | space.space(rows, labels)
    )
    assert {name: found.metrics[name] for name in alone} == pytest.approx(alone, rel=1e-6)
    assert {"auc", "equal_error_rate", "knn_1shot", "svm_5shot", "gnb_5shot_low"} <= set(found.metrics)


def test_thresholds_from_elsewhere_are_put_to_the_test(whole, found):
    assert [each.far_target for each in found.transfers] == [0.1, 0.02]
    assert [point.far_target for point in found.operating_points] == [0.1, 0.01, 0.001]
    assert all(point.far <= point.far_target for point in found.operating_points)
    assert found.operating_points == evaluate.calibrate(whole.embeddings_ND, whole.labels_N, CONFIG)
    assert [held.far for held in found.held] == [point.far for point in found.operating_points]


def test_as_json_under_a_prefix(found):
    read = json.loads(json.dumps(found.as_dict("test/"), allow_nan=False))
    assert read["metrics"]["test/recall@1"] == found.metrics["recall@1"]
    assert (read["samples"], read["classes"]) == (98, 14)
    assert read["transfer"][0]["far"] == found.transfers[0].far
    assert read["operating_points"][0]["worst_far"][0]["name"].startswith("class ")


def test_all_figures_are_drawn(whole, found, tmp_path):
    drawn = dict(report.figures(found, whole, CONFIG))
    assert set(drawn) == {
        "utility", "error_rates", "distances", "class_far", "spectrum", "neighbours", "map"
    }  # fmt: skip
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000, name


def test_parts_that_are_skipped_leave_their_figures_out(whole):
    found = report.measure(whole, CONFIG, skip=("pairs", "clustering", "classification", "space"))
    assert not {"auc", "nmi", "knn_1shot", "pi_ratio"} & set(found.metrics)
    assert {name for name, _ in report.figures(found, whole, CONFIG)} == {"utility", "neighbours", "map"}
    with pytest.raises(ValueError, match=r"unknown part 'speed'; valid: .*retrieval"):
        report.measure(whole, CONFIG, skip=("speed",))


def test_with_a_gallery_the_rows_are_queries(whole):
    queries = torch.arange(len(whole.labels_N)) % 3 == 0
    gallery = (whole.embeddings_ND[~queries], whole.labels_N[~queries])
    asked = report.Subject(whole.embeddings_ND[queries], whole.labels_N[queries], whole.classes, gallery)
    found = report.measure(asked, CONFIG)
    alone = retrieval.retrieval(asked.embeddings_ND, asked.labels_N, gallery=gallery).means()
    assert found.metrics["recall@1"] == alone["recall@1"]
    assert found.counts == {"samples": 33, "classes": 14, "gallery": 65}
    assert found.pairs.positives + found.pairs.negatives == 33 * 65
    assert {name for name, _ in report.figures(found, asked, CONFIG)} == {
        "utility", "error_rates", "distances", "class_far"
    }  # fmt: skip


def test_collapsed_embeddings_are_reported_and_drawn_not_raised():
    alike = report.Subject(torch.ones(40, 4), torch.arange(40) % 8, tuple("abcdefgh"))
    found = report.measure(alike, CONFIG)
    assert {name: found.metrics[name] for name in evaluate.COLLAPSED} == evaluate.COLLAPSED
    assert found.operating_points == ()
    json.dumps(found.as_dict(), allow_nan=False)
    assert {"error_rates", "distances"} <= {name for name, _ in report.figures(found, alike, CONFIG)}


def test_labelled_pairs_of_all_rows_give_the_rates_of_all_pairs(whole, found):
    names = tuple(f"row {i}" for i in range(len(whole.labels_N)))
    i, j = np.triu_indices(len(names), 1)
    same = tuple((whole.labels_N[i] == whole.labels_N[j]).tolist())
    pairs = LabelledPairs(tuple(names[x] for x in i), tuple(names[x] for x in j), same)
    labelled = report.measure_pairs(
        report.LabelledSubject(pairs, names, whole.embeddings_ND), CONFIG, points=found.operating_points
    )
    assert labelled.metrics["auc"] == pytest.approx(found.metrics["auc"], abs=1e-5)
    assert labelled.counts == {"pairs": len(i), "same": sum(same)}
    for rates, point in zip(labelled.rates, found.operating_points, strict=True):
        assert (rates.far, rates.frr) == pytest.approx((point.far, point.frr), abs=1e-3)
    assert {name for name, _ in report.figures(labelled, None, CONFIG)} == {"error_rates", "distances"}


def test_labels_without_names_are_refused():
    with pytest.raises(ValueError, match="label 3 has no name: there are 2 classes"):
        report.Subject(torch.ones(4, 2), torch.arange(4), ("a", "b"))
