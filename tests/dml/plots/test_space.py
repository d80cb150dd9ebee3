"""The spectrum and the map."""

import numpy as np
import pytest

from dml import plots
from dml.plots import space

WORST_NAMES = ["_first", "$1^", "three\nlines\nlong", "x" * 300]


def drawn(axes):
    """The points of a map by the name in the legend."""
    return {str(points.get_label()): np.asarray(points.get_offsets()) for points in axes.collections}


def test_singular_values_are_drawn_as_shares_beside_the_flat_spectrum():
    axes = plots.spectrum([1.0, 4.0, 3.0, 2.0], 0.25).axes[0]
    values, flat = axes.lines
    np.testing.assert_allclose(values.get_ydata(), [0.4, 0.3, 0.2, 0.1])
    assert flat.get_ydata() == [0.25, 0.25]
    assert "spectral decay rho 0.25" in axes.get_xlabel()
    assert "3 of 4 directions hold 90%" in axes.get_xlabel()


@pytest.mark.parametrize("values", [[2.0], [1.0, 0.0, 0.0], np.exp(-np.arange(512.0)), np.ones(8)], ids=len)
def test_one_direction_and_many_are_drawn(values, tmp_path):
    figure = plots.spectrum(values, 1.0)
    figure.savefig(tmp_path / "spectrum.png")
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < 1 / len(values) < high


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]], ids=str)
def test_no_spectrum_of_nothing(values):
    with pytest.raises(ValueError, match="needs singular values"):
        plots.spectrum(values, 0.0)


def test_each_of_few_classes_has_its_points_under_its_name():
    rng = np.random.default_rng(0)
    points, labels = rng.standard_normal((60, 2)), rng.integers(0, 3, 60) * 7
    found = drawn(plots.embedding_map(points, labels, {0: "owl", 7: "fox", 14: "hen"}).axes[0])
    assert list(found) == ["owl", "fox", "hen"]
    for name, label in (("owl", 0), ("fox", 7), ("hen", 14)):
        np.testing.assert_array_equal(found[name], points[labels == label])


def test_no_two_of_the_coloured_classes_look_alike():
    labels = np.repeat(np.arange(space.COLORED), 2)
    axes = plots.embedding_map(np.random.default_rng(0).standard_normal((len(labels), 2)), labels).axes[0]
    looks = {(tuple(p.get_facecolor()[0]), len(p.get_paths()[0].vertices)) for p in axes.collections}
    assert len(looks) == space.COLORED


def test_of_many_classes_a_seeded_few_are_coloured_and_the_rest_grey():
    rng = np.random.default_rng(0)
    labels = np.r_[np.repeat(np.arange(40), 3), 40:60]  # the last twenty have one sample each
    points = rng.standard_normal((len(labels), 2))
    found = drawn(plots.embedding_map(points, labels, seed=1).axes[0])
    assert sum(len(own) for own in found.values()) == len(points)
    others = found.pop("48 other classes")
    assert len(found) == space.HIGHLIGHTED
    for name, own in found.items():
        np.testing.assert_array_equal(own, points[labels == int(name)])
        assert len(own) == 3
    assert len(others) == len(points) - 3 * space.HIGHLIGHTED
    assert drawn(plots.embedding_map(points, labels, seed=1).axes[0]).keys() - {"48 other classes"} == found.keys()
    assert drawn(plots.embedding_map(points, labels, seed=2).axes[0]).keys() - {"48 other classes"} != found.keys()


def test_any_name_stands_in_the_legend(tmp_path):
    figure = plots.embedding_map(np.eye(4)[:, :2], np.arange(4), WORST_NAMES)
    figure.savefig(tmp_path / "map.png")
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(texts) == 4
    assert max(map(len, texts)) < 40


@pytest.mark.parametrize("samples", [1, 30])
def test_points_on_one_spot_are_drawn(samples, tmp_path):
    figure = plots.embedding_map(np.zeros((samples, 2)), np.arange(samples))
    figure.savefig(tmp_path / "map.png")
    assert sum(map(len, drawn(figure.axes[0]).values())) == samples


@pytest.mark.parametrize("shapes", [((0, 2), (0,)), ((3, 3), (3,)), ((3, 2), (2,))], ids=str)
def test_a_map_needs_a_label_for_every_point(shapes):
    with pytest.raises(ValueError, match=r"needs points \(N, 2\) and labels \(N,\)"):
        plots.embedding_map(np.zeros(shapes[0]), np.zeros(shapes[1], dtype=int))
