"""What a request is decided by: a FAR that was calibrated, a threshold of its own, or the middle operating point."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster import registry
from dml.metrics.operating_points import OperatingPoint
from serve.calibration import Calibration, decide
from serve.schemas import ApiError
from tests.serve.calibrated import histograms
from tests.serve.pictures import MeanColour


def point(far: float, threshold: float, **more: Any) -> dict[str, Any]:
    return asdict(OperatingPoint(far, threshold, far, 0.1, negatives=1000, positives=100, **more))


POINTS = [point(0.1, 0.9), point(0.01, 0.7, far_interval=(0.005, 0.02)), point(0.001, 0.5)]


def calibrated(*points: dict[str, Any]) -> MeanColour:
    model = MeanColour()
    model.calibration = Calibration.of(points) if points else None
    return model


def test_a_far_chooses_its_operating_point() -> None:
    threshold, chosen = decide(calibrated(*POINTS), 0.01, None)
    assert chosen is not None
    assert (threshold, chosen.far_target, chosen.far_interval) == (0.7, 0.01, (0.005, 0.02))


@pytest.mark.parametrize(("count", "far"), [(3, 0.01), (2, 0.01), (1, 0.1)])
def test_with_neither_the_middle_point_decides_and_of_two_the_stricter(count: int, far: float) -> None:
    threshold, chosen = decide(calibrated(*POINTS[:count]), None, None)
    assert chosen is not None
    assert (threshold, chosen.far_target) == (chosen.threshold, far)


@pytest.mark.parametrize("threshold", [0.0, 0.8, 2.0])
def test_a_threshold_needs_no_calibration(threshold: float) -> None:
    assert decide(calibrated(), None, threshold) == decide(calibrated(*POINTS), None, threshold) == (threshold, None)


@pytest.mark.parametrize(
    ("points", "far", "threshold", "code", "param", "says"),
    [
        (3, 0.05, None, "far_not_calibrated", "far", "valid: 0.001, 0.01, 0.1, or give a threshold"),
        (3, math.nan, None, "far_not_calibrated", "far", "nan was not calibrated"),
        (3, 0.1, 0.8, "far_and_threshold", "threshold", "give one of them"),
        (3, None, -0.1, "not_a_distance", "threshold", "valid: 0 to 2"),
        (3, None, 2.1, "not_a_distance", "threshold", "2.1 is no distance"),
        (3, None, math.nan, "not_a_distance", "threshold", "nan is no distance"),
        (0, 0.1, None, "not_calibrated", "far", "colour@7 has no operating points: give a threshold"),
        (0, None, None, "not_calibrated", None, "python -m serve.calibrate"),
    ],
)
def test_what_cannot_be_decided_is_refused_in_words(
    points: int, far: float | None, threshold: float | None, code: str, param: str | None, says: str
) -> None:
    with pytest.raises(ApiError) as refused:
        decide(calibrated(*POINTS[:points]), far, threshold)
    assert (refused.value.status, refused.value.code, refused.value.param) == (422, code, param)
    assert says in refused.value.message


def test_a_registered_calibration_has_the_histograms_of_its_evaluation(tmp_path: Path) -> None:
    path = tmp_path / registry.OPERATING_POINTS
    assert Calibration.read(path) is None
    path.write_text("[]")
    assert Calibration.read(path) is None
    path.write_text(json.dumps(POINTS))
    before = Calibration.read(path)
    assert before is not None
    assert before.histograms is None
    evaluation = tmp_path / registry.EVALUATION
    evaluation.write_text(json.dumps({"metrics": {}, "distances": histograms().as_dict()}))
    found = Calibration.read(path)
    assert found is not None
    assert (found.histograms, found.id, found.source) == (histograms(), before.id, "registered")
    evaluation.write_text(json.dumps({"distances": None}))
    assert Calibration.read(path) == before


def test_a_point_in_cosine_distance_is_converted_and_its_id_is_that_of_what_was_stored() -> None:
    stored = point(0.1, 0.32, distance="cosine")
    calibration = Calibration.of([stored])
    assert calibration.points[0].distance == "euclidean"
    assert calibration.points[0].threshold == pytest.approx(math.sqrt(2 * 0.32))  # |a - b|^2 = 2 (1 - cos)
    assert calibration.id != Calibration.of([point(0.1, math.sqrt(2 * 0.32))]).id
    assert calibration.id == Calibration.of([stored]).id
