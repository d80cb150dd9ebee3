"""The figures that a search and a promotion end with, where a figure that they divide by is 0."""

import pytest

from tune import compare, report, tested


def model(opis: float) -> tested.Tested:
    metrics = {f"test/{name}": 0.9 for name in ("recall@1", "sqrt_opis", "opis_noise_floor", "mean_utility")}
    return tested.Tested({**metrics, "test/opis": opis}, None, 2, ())


def test_the_change_of_opis_is_left_out_where_the_baselines_is_0() -> None:
    """As of two classes far apart."""
    assert report.summary(model(0.004), model(0.001))["test/opis_change"] == pytest.approx(-0.75)
    found = report.summary(model(0.0), model(0.001))
    assert "test/opis_change" not in found
    assert found["test/baseline/opis"] == 0


def test_a_comparison_without_tcm_at_0_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    compare._print([(model(0.0).metrics, model(0.001).metrics)], classes=2)
    assert "TCM changes mean OPIS by n/a and Recall@1 by 0.00 points" in capsys.readouterr().out
