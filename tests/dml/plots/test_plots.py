"""What holds for every figure."""

import subprocess
import sys

import numpy as np
import pytest

from dml.plots.style import spread

EVERY_FIGURE = """
import sys
import numpy as np
from dml import plots
from dml.metrics.pair_distances import PairDistances
assert "matplotlib" not in sys.modules
pairs = PairDistances(np.array([0.5, 1.0]), np.array([3, 1]), np.array([1, 5]), "cosine")
drawn = [
    plots.search_scatter([{"number": 0, "recall": 1, "opis": 0, "state": "other"}]),
    plots.error_rates(pairs),
    plots.distance_histograms(pairs, [0.5]),
    plots.class_far([0.1, 0.2], far_target=0.1),
    plots.spectrum([2.0, 1.0], 0.1),
    plots.embedding_map([[0, 1], [1, 0]], [0, 1]),
    plots.contact_sheet([np.zeros((4, 4), np.uint8)] * 2, [0, 1], [0], [[1]], [[0.3]]),
]
for figure in drawn:
    figure.savefig(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""


def test_neither_importing_nor_drawing_loads_pyplot(tmp_path):
    subprocess.run([sys.executable, "-c", EVERY_FIGURE, str(tmp_path / "figure.png")], check=True)


def test_labels_that_fit_stay_where_they_are():
    assert spread([0.7, 0.1, 0.4], 0.1, 0, 1).tolist() == pytest.approx([0.7, 0.1, 0.4])


@pytest.mark.parametrize("places", [[0.5] * 4, [0.99, 0.98, 1.0, 5.0], [-1.0, 0.0, 0.01], [0.3, 0.31, 0.9]], ids=str)
def test_labels_are_set_apart_in_their_order(places):
    found = spread(places, 0.1, 0, 1)
    order = np.argsort(places, kind="stable")
    assert np.diff(found[order]).min() > 0.1 - 1e-12
    assert 0 <= found.min() <= found.max() <= 1


def test_labels_that_are_too_many_share_the_room():
    assert spread([0.5] * 21, 0.1, 0, 1).tolist() == pytest.approx(np.linspace(0, 1, 21).tolist())


def test_no_labels_need_no_room():
    assert spread([], 0.1, 0, 1).tolist() == []
