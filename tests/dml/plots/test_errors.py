"""FAR and FRR curves and histograms of distances say what the pairs say."""

import numpy as np
import pytest

from dml import plots
from dml.metrics.operating_points import OperatingPoint
from dml.metrics.pair_distances import PairDistances, pair_distances, rates_at
from dml.plots import errors


def random_pairs(size=50, seed=0):
    """Positives near, negatives far."""
    rng = np.random.default_rng(seed)
    distances_M = np.sort(rng.uniform(0.1, 1.9, size))
    positives_M = rng.integers(0, 5, size) * (distances_M < 1.2)
    negatives_M = rng.integers(1, 50, size) * (distances_M > 0.6)
    return PairDistances(distances_M, positives_M, negatives_M, "euclidean")


PERFECT = PairDistances(np.array([0.1, 0.2, 0.8]), np.array([3, 2, 0]), np.array([0, 0, 7]), "cosine")
REVERSED = PairDistances(np.array([0.1, 0.9]), np.array([0, 5]), np.array([5, 0]), "cosine")
ONE_DISTANCE = PairDistances(np.array([0.5]), np.array([3]), np.array([5]), "cosine")


def point(target, threshold, distance="euclidean"):
    """An operating point that was calibrated on other pairs."""
    return OperatingPoint(target, threshold, far=target, frr=0.5, negatives=100, positives=10, distance=distance)


def curve(axes, name):
    (line,) = (line for line in axes.lines if str(line.get_label()).startswith(name))
    return line


def step_at(line, x):
    """The value of a step that holds from its point to the next."""
    assert line.get_drawstyle() == "steps-post"
    return line.get_ydata()[line.get_xdata().searchsorted(x, side="right") - 1]


def test_rates_at_any_threshold_are_those_of_the_pairs():
    pairs = random_pairs()
    axes = plots.error_rates(pairs).axes[0]
    assert axes.get_yscale() == "log"
    for x in (*np.linspace(0.09, 1.91, 97), *pairs.distances_M):
        far = pairs.negatives_M[pairs.distances_M <= x].sum() / pairs.negatives
        frr = pairs.positives_M[pairs.distances_M > x].sum() / pairs.positives
        assert step_at(curve(axes, "FAR"), x) == pytest.approx(far, abs=1e-15)
        assert step_at(curve(axes, "FRR"), x) == pytest.approx(frr, abs=1e-15)


def test_many_distances_are_drawn_at_fewer_thresholds_that_are_exact():
    pairs = random_pairs(size=20 * errors.STEPS)
    x, y = curve(plots.error_rates(pairs).axes[0], "FAR").get_data()
    assert len(x) == errors.STEPS + 2
    assert list(y[1:-1]) == [rates_at(pairs, threshold).far for threshold in x[1:-1]]


def test_operating_points_stand_where_their_thresholds_fall_on_these_pairs():
    pairs = random_pairs()
    axes = plots.error_rates(pairs, [point(0.1, 0.9), point(0.01, 0.7)], title="test").axes[0]
    dots = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    rates = [rates_at(pairs, threshold) for threshold in (0.9, 0.7)]
    assert dots == [[[0.9, rates[0].far], [0.9, rates[0].frr]], [[0.7, rates[1].far], [0.7, rates[1].frr]]]
    notes = [note.get_text() for note in axes.texts]
    assert notes[0] == f"FAR target 0.1, threshold 0.900\nFAR {rates[0].far:.3g}, FRR {rates[0].frr:.3g}"
    assert notes[1].startswith("FAR target 0.01, threshold 0.700")


def test_operating_points_in_another_distance_are_converted():
    axes = plots.error_rates(random_pairs(), [point(0.1, 0.5, "cosine")]).axes[0]
    (dots,) = (line.get_xdata() for line in axes.lines if line.get_marker() == "o")
    assert list(dots) == [1.0, 1.0]  # sqrt(2 * 0.5)
    assert "threshold 1.000" in axes.texts[0].get_text()


def test_notes_of_near_operating_points_do_not_overlap():
    points = [point(0.1 + i / 100, 0.9 + i / 1000) for i in range(5)]
    figure = plots.error_rates(random_pairs(), points)
    figure.draw_without_rendering()
    places = sorted(note.xyann[1] for note in figure.axes[0].texts)
    height = figure.axes[0].get_window_extent().height
    assert min(np.diff(places)) * height > 2 * 8 * figure.dpi / 72  # two lines of text of 8 points


def test_the_equal_error_rate_is_marked_and_written():
    pairs = random_pairs()
    axes = plots.error_rates(pairs).axes[0]
    x, y = curve(axes, "equal error rate").get_data()
    assert y == [pairs.equal_error_rate]
    before = rates_at(pairs, np.nextafter(x[0], 0))
    assert before.far < before.frr
    assert rates_at(pairs, x[0]).far >= rates_at(pairs, x[0]).frr
    assert f"equal error rate {y[0]:.3g} at {x[0]:.3f}, AUC {pairs.auc:.4g}" in axes.get_xlabel()
    assert f"{pairs.positives:,} positive and {pairs.negatives:,} negative pairs" in axes.get_xlabel()


@pytest.mark.parametrize("pairs", [PERFECT, REVERSED, ONE_DISTANCE], ids=["perfect", "reversed", "one distance"])
def test_degenerate_pairs_are_drawn(pairs, tmp_path):
    for figure in (
        plots.error_rates(pairs, [point(0.01, 0.5, pairs.distance)]),
        plots.distance_histograms(pairs, [0.5, 0.5, 1.0]),
    ):
        low, high = figure.axes[0].get_ylim()
        assert 0 <= low < high < np.inf
        figure.savefig(tmp_path / "figure.png")
    assert "euclidean" not in figure.axes[0].get_xlabel()


def test_histograms_hold_every_pair():
    pairs = random_pairs(size=5000)
    axes = plots.distance_histograms(pairs).axes[0]
    filled = [stairs.get_data() for stairs in axes.patches if stairs.get_fill()]
    for (density, edges, _), counts_M in zip(filled, (pairs.negatives_M, pairs.positives_M), strict=True):
        inside = [
            counts_M[(pairs.distances_M >= low) & (pairs.distances_M < high)].sum()
            for low, high in zip(edges[:-1], [*edges[1:-1], np.inf], strict=True)
        ]
        np.testing.assert_allclose(density * np.diff(edges) * counts_M.sum(), inside, atol=1e-6)
        assert (density * np.diff(edges)).sum() == pytest.approx(1)


def test_thresholds_cut_histograms_and_say_what_they_do():
    pairs = random_pairs()
    axes = plots.distance_histograms(pairs, [0.7, 0.9]).axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == [0.7, 0.9]
    rates = rates_at(pairs, 0.7)
    assert axes.texts[0].get_text() == f"0.700: FAR {rates.far:.2g}, FRR {rates.frr:.2g}"


def test_pairs_of_embeddings_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), 6)
    rows = rng.standard_normal((30, 8))[labels] + rng.standard_normal((180, 8))
    pairs = pair_distances(rows, labels)
    plots.error_rates(pairs, [point(0.1, 0.9)]).savefig(tmp_path / "rates.png")
    plots.distance_histograms(pairs, [0.9]).savefig(tmp_path / "distances.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("rates.png", "distances.png"))
