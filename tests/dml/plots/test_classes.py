"""How FAR swings from class to class at one threshold."""

import numpy as np
import pytest

from dml import plots


def line(axes, name):
    (found,) = (line for line in axes.lines if str(line.get_label()).startswith(name))
    return found


def test_classes_ascend_by_their_far_and_lines_stand_at_target_and_pooled_rate():
    far_C = np.random.default_rng(0).uniform(0.001, 0.1, 50)
    axes = plots.class_far(far_C, far_target=0.01, far=0.012, threshold=0.75).axes[0]
    x, y = line(axes, "one class").get_data()
    assert (x.tolist(), y.tolist()) == (list(range(1, 51)), sorted(far_C))
    assert line(axes, "target 0.01").get_ydata() == [0.01, 0.01]
    assert line(axes, "all classes together 0.012").get_ydata() == [0.012, 0.012]
    assert f"{(far_C > 0.01).sum()} of 50 classes above the target" in axes.get_xlabel()
    assert axes.get_ylabel() == "FAR of the class at threshold 0.750"


def test_the_band_holds_nine_classes_in_ten():
    far_C = np.linspace(0.01, 0.11, 101)
    axes = plots.class_far(far_C, far_target=0.01).axes[0]
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == (pytest.approx(0.015), pytest.approx(0.105))
    assert "median 0.06, 90% of classes within 0.015 and 0.1, worst 0.11" in axes.get_xlabel()


def test_the_worst_classes_are_named_at_their_points():
    far_C = [0.1, 0.001, 0.3, 0.0, 0.2]
    axes = plots.class_far(far_C, far_target=0.01, names=["fox", "owl", "hen", "cat", "dog"], worst=3).axes[0]
    named = {note.get_text(): note.xy for note in axes.texts}
    assert named == {"hen  0.3": (5, 0.3), "dog  0.2": (4, 0.2), "fox  0.1": (3, 0.1)}


def test_a_class_without_false_accepts_is_not_among_the_worst_but_is_seen():
    axes = plots.class_far([0.0, 0.2, 0.0], far_target=0.01).axes[0]
    assert [note.get_text() for note in axes.texts] == ["class 1  0.2"]
    assert axes.get_yscale() == "symlog"
    assert axes.get_ylim()[0] < 0


def test_names_are_text_and_not_mathematics_and_not_endless(tmp_path):
    names = ["$x^$ costs $5", "_hidden", "a name " * 20]
    figure = plots.class_far([0.1, 0.2, 0.3], far_target=0.01, names=names)
    figure.savefig(tmp_path / "far.png")
    assert all(len(note.get_text()) < 40 for note in figure.axes[0].texts)


@pytest.mark.parametrize("far_C", [[0.0], [0.2], [0.0] * 5, [1.0] * 5, [1e-9, 1.0]], ids=str)
def test_degenerate_rates_are_drawn(far_C, tmp_path):
    figure = plots.class_far(far_C, far_target=0.01, far=float(np.mean(far_C)))
    figure.savefig(tmp_path / "far.png")
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert low < min(far_C)
    assert high > max(far_C)


@pytest.mark.parametrize(
    ("far_C", "options", "message"),
    [
        ([], {}, "a class at least"),
        ([0.1, 1.5], {}, r"far_C\[1\] = 1.5"),
        ([float("nan")], {}, r"far_C\[0\] = nan"),
        ([0.1], {"far_target": 0.0}, "far_target must lie between 0 and 1, got 0"),
        ([0.1], {"names": ["a", "b"]}, "2 names for 1 classes"),
    ],
)
def test_what_cannot_be_drawn_is_said(far_C, options, message):
    with pytest.raises(ValueError, match=message):
        plots.class_far(far_C, **{"far_target": 0.01, **options})
