"""The contact sheet shows what was found, and what of it is wrong without relying on colour."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from dml import plots
from dml.plots import style


def pictures(count, seed=0):
    """Grey and coloured, each of its own size."""
    rng = np.random.default_rng(seed)
    shapes = [(20 + i, 30) if i % 2 else (10, 12 + i, 3) for i in range(count)]
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


def frames(axes):
    return [patch for patch in axes.patches if to_hex(patch.get_edgecolor(), keep_alpha=True) != "#00000000"]


def texts(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


IMAGES = pictures(6)
LABELS = np.array([0, 0, 1, 1, 2, 2])
NAMES = ["owl", "fox", "hen"]


def test_every_row_is_a_query_and_its_neighbours_in_order():
    axes = plots.contact_sheet(IMAGES, LABELS, [4, 0], [[5, 2], [1, 3]], [[0.1, 0.2], [0.3, 0.4]]).axes[0]
    shown = [image.get_array() for image in axes.get_images()]
    for pixels, which in zip(shown, [4, 5, 2, 0, 1, 3], strict=True):
        np.testing.assert_array_equal(pixels, IMAGES[which])
    left = [image.get_extent()[0] // 1.14 for image in axes.get_images()]
    assert left == [0, 1, 2, 0, 1, 2]


def test_right_ones_are_framed_green_wrong_ones_red_dashed_and_named():
    axes = plots.contact_sheet(IMAGES, LABELS, [0], [[1, 2]], [[0.25, 0.5]], names=NAMES).axes[0]
    query, right, wrong = frames(axes)
    assert (to_hex(right.get_edgecolor()), right.get_linestyle()) == (style.RIGHT, "solid")
    assert to_hex(wrong.get_edgecolor()) == style.WRONG
    assert wrong.get_linestyle() not in ("solid", "-")
    assert to_hex(query.get_edgecolor()) == style.INK
    assert texts(axes) == ["query", "owl", "0.250 ✓", "0.500 ✗", "fox"]


@pytest.mark.parametrize("shape", [(10, 40), (40, 10, 3), (1, 1)], ids=str)
def test_images_keep_their_shape_in_the_middle_of_their_place(shape):
    axes = plots.contact_sheet([np.zeros(shape, np.uint8)], [0], [0], [[-1]], [[0.0]]).axes[0]
    left, right, bottom, top = axes.get_images()[0].get_extent()
    assert (bottom - top) / (right - left) == pytest.approx(shape[0] / shape[1])
    assert max(bottom - top, right - left) == pytest.approx(1)
    assert (left + right, bottom + top) == (pytest.approx(1), pytest.approx(1))


def test_grey_is_drawn_from_black_to_white_whatever_the_image_holds():
    axes = plots.contact_sheet([np.full((4, 4), 100, np.uint8)], [0], [0], [[-1]], [[0.0]]).axes[0]
    assert axes.get_images()[0].get_clim() == (0, 255)


def test_neighbours_of_a_gallery_have_its_images_and_labels():
    gallery = pictures(3, seed=1)
    axes = plots.contact_sheet(
        IMAGES, LABELS, [4], [[0, 2]], [[0.1, 0.2]], gallery=(gallery, [2, 0, 1]), names=NAMES
    ).axes[0]
    shown = [image.get_array() for image in axes.get_images()]
    for pixels, expected in zip(shown, (IMAGES[4], gallery[0], gallery[2]), strict=True):
        np.testing.assert_array_equal(pixels, expected)
    assert texts(axes) == ["query", "hen", "0.100 ✓", "0.200 ✗", "fox"]


def test_only_the_images_that_are_drawn_are_asked_for_and_missing_neighbours_leave_a_gap():
    images = {0: IMAGES[0], 3: IMAGES[3]}
    axes = plots.contact_sheet(images, LABELS, [0], [[3, -1]], [[0.5, np.inf]]).axes[0]
    assert len(axes.get_images()) == len(frames(axes)) == 2


def test_any_name_is_drawn(tmp_path):
    names = ["_first $1^ " * 9, "two\nlines", "naïve"]
    figure = plots.contact_sheet(IMAGES, LABELS, [0, 2, 4], [[3], [5], [0]], np.ones((3, 1)), names=names, title="$")
    figure.savefig(tmp_path / "sheet.png")
    assert max(len(text) for text in texts(figure.axes[0])) < 30


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((3, 0), np.uint8), np.zeros(4, np.uint8)]
)
def test_what_is_no_picture_is_named(image):
    with pytest.raises(ValueError, match=r"image 1 must be uint8 \(H, W\) or \(H, W, 3\)"):
        plots.contact_sheet([IMAGES[0], image], [0, 0], [0], [[1]], [[0.1]])


@pytest.mark.parametrize(("queries", "neighbours"), [([], np.zeros((0, 2))), ([0], [[1], [2]]), ([0], [1])])
def test_rows_need_a_query_each(queries, neighbours):
    with pytest.raises(ValueError, match="with a query at least"):
        plots.contact_sheet(IMAGES, LABELS, queries, neighbours, np.zeros(np.shape(neighbours)))


@pytest.mark.parametrize(
    ("wrong", "right", "count", "picked"),
    [
        (50, 50, 8, (4, 4)),
        (50, 50, 7, (4, 3)),
        (1, 50, 8, (1, 7)),
        (50, 2, 8, (6, 2)),
        (0, 9, 4, (0, 4)),
        (3, 2, 9, (3, 2)),
    ],
)
def test_half_of_the_queries_are_wrong_as_far_as_there_are(wrong, right, count, picked):
    correct = np.random.default_rng(0).permutation(np.r_[np.zeros(wrong, bool), np.ones(right, bool)])
    queries = plots.pick_queries(correct, count)
    assert len(set(queries.tolist())) == len(queries)
    np.testing.assert_array_equal(correct[queries], [False] * picked[0] + [True] * picked[1])


def test_queries_depend_on_the_seed_alone():
    correct = np.arange(1000) % 3 > 0
    np.testing.assert_array_equal(plots.pick_queries(correct, 8, seed=1), plots.pick_queries(correct, 8, seed=1))
    assert set(plots.pick_queries(correct, 8, seed=1)) != set(plots.pick_queries(correct, 8, seed=2))


def test_queries_are_picked_from_booleans():
    with pytest.raises(ValueError, match="must be booleans"):
        plots.pick_queries(np.arange(4), 2)
    with pytest.raises(ValueError, match="count must be at least 1"):
        plots.pick_queries(np.ones(4, bool), 0)
