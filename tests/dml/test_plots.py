"""Figures hold what the results say, and are drawn without pyplot or a display."""

import subprocess
import sys

import numpy as np
import pytest

from dml import plots
from dml.metrics.threshold import opis, threshold_curves, utility


def curves(classes, seed=0, **options):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), 6)
    rows = rng.standard_normal((classes, 8))[labels] + 0.8 * rng.standard_normal((len(labels), 8))
    return threshold_curves(rows, labels, **options)


def line_data(axes):
    return [line.get_ydata() for line in axes.get_lines() if len(line.get_ydata()) > 2]


def test_each_class_has_a_line_and_the_mean_is_bold(tmp_path):
    result = curves(10)
    figure = plots.utility_curves(result, title="val")
    *classes, mean = line_data(figure.axes[0])
    np.testing.assert_allclose(classes, utility(result))
    np.testing.assert_allclose(mean, utility(result).mean(0))
    assert f"OPIS {opis(result):.3g}" in figure.axes[0].get_xlabel()
    figure.savefig(tmp_path / "utility.png")
    assert (tmp_path / "utility.png").stat().st_size > 5000


def test_many_classes_become_bands():
    figure = plots.utility_curves(curves(plots.LINES + 1))
    assert len(line_data(figure.axes[0])) == 1
    assert len(figure.axes[0].collections) == 3


def test_two_models_share_their_axes():
    figure = plots.compare_utility(curves(10), curves(10, seed=1), names=("without", "with"))
    left, right = figure.axes
    assert (left.get_xlim(), left.get_ylim()) == (right.get_xlim(), right.get_ylim())
    assert (left.get_title(), right.get_title()) == ("without", "with")


def test_models_over_different_distances_do_not_compare():
    with pytest.raises(ValueError, match="euclidean and cosine"):
        plots.compare_utility(curves(10), curves(10, distance="cosine"))


def test_search_marks_baseline_and_winner():
    rows = [
        {"number": 0, "recall": 0.9, "opis": 0.04, "state": "baseline"},
        {"number": 1, "recall": 0.8, "opis": 0.09, "state": "other"},
        {"number": 2, "recall": 0.95, "opis": 0.01, "state": "winner"},
    ]
    axes = plots.search_scatter(rows).axes[0]
    drawn = {points.get_label(): points.get_offsets().tolist() for points in axes.collections}
    assert drawn["baseline, no TCM"] == [[pytest.approx(0.2), 0.9]]
    assert drawn["winner"] == [[pytest.approx(0.1), 0.95]]
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2"]


def test_a_search_needs_trials_of_known_states():
    with pytest.raises(ValueError, match="at least one trial"):
        plots.search_scatter([])
    with pytest.raises(ValueError, match="unknown state 'won'; valid: winner"):
        plots.search_scatter([{"number": 0, "recall": 1.0, "opis": 0.0, "state": "won"}])


def test_neither_importing_nor_drawing_loads_pyplot():
    code = (
        "import sys, dml.plots as plots; assert 'matplotlib' not in sys.modules\n"
        "plots.search_scatter([{'number': 0, 'recall': 1, 'opis': 0, 'state': 'other'}])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
