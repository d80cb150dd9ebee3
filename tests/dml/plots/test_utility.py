"""Every class's utility is drawn as it is, and the range is named as it was chosen."""

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


@pytest.mark.parametrize(
    ("bounds", "written"),
    [
        ({"far_range": (0.05, 0.2)}, ["FAR 0.05", "FAR 0.2"]),
        ({"frr_range": (0.05, 0.2)}, ["FRR 0.2", "FRR 0.05"]),  # a nearer threshold rejects more
        ({"distance_range": (0.5, 1.2)}, ["distance 0.5", "distance 1.2"]),
    ],
)
def test_the_ends_of_the_range_say_what_they_are(bounds, written):
    result = curves(10, **bounds)
    axes = plots.utility_curves(result).axes[0]
    assert [(note.get_text(), note.xy[0]) for note in axes.texts] == list(
        zip(written, result.thresholds_T[[0, -1]], strict=True)
    )
