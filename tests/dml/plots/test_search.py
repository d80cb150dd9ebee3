"""The trials of a search as points."""

import pytest

from dml import plots


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
