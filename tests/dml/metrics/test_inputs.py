"""What every metric asks of its input, and the precision that it computes in."""

import numpy as np
import pytest
import torch

from dml.metrics.inputs import full_precision, query_gallery, unit_rows

RNG = np.random.default_rng(0)
ROWS, LABELS = RNG.standard_normal((12, 4)), np.arange(12) % 3
ITEMS, ITEM_LABELS = RNG.standard_normal((9, 4)), np.arange(9) % 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_have_unit_length_in_float32_or_wider(dtype):
    held = torch.from_numpy(ROWS).to(dtype)
    rows, labels = unit_rows(held, LABELS.astype(np.uint8))
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert labels.dtype == torch.int64
    exact = held.double() / held.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows.double(), exact, rtol=0, atol=1e-15 if dtype == torch.float64 else 2e-7)


@pytest.mark.parametrize(("scale", "dtype"), [(1e-38, np.float32), (1e38, np.float32), (1e-300, float), (1e300, float)])
def test_squares_that_would_overflow_or_vanish(scale, dtype):
    rows, _ = unit_rows((ROWS * scale).astype(dtype), LABELS)
    np.testing.assert_allclose(rows.norm(dim=1), 1, atol=1e-6)


def test_the_graph_and_the_input_are_left_alone():
    held = torch.from_numpy(ROWS.copy()).requires_grad_()
    rows, _ = unit_rows(held, LABELS)
    assert not rows.requires_grad
    np.testing.assert_array_equal(held.detach(), ROWS)


def test_the_wider_side_decides_the_precision_of_queries_and_gallery():
    queries, labels, items, item_labels = query_gallery(ROWS.astype(np.float16), LABELS, (ITEMS, ITEM_LABELS))
    assert queries.dtype == items.dtype == torch.float64
    assert (len(queries), len(items)) == (12, 9)
    assert labels.tolist() == LABELS.tolist()
    assert item_labels.tolist() == ITEM_LABELS.tolist()
    assert (
        query_gallery(ROWS.astype(np.float32), LABELS, (ITEMS.astype(np.float16), ITEM_LABELS))[0].dtype
        == torch.float32
    )


def spoiled(rows, row, value):
    rows = rows.copy()
    rows[row] = value
    return rows


@pytest.mark.parametrize(
    ("queries", "labels", "gallery", "message"),
    [
        (ROWS, LABELS[:-1], (ITEMS, ITEM_LABELS), r"queries \(N, D\) .* got \(12, 4\) and \(11,\)"),
        (ROWS, LABELS, (ITEMS, ITEM_LABELS[:-1]), r"gallery \(N, D\) .* got \(9, 4\) and \(8,\)"),
        (ROWS, LABELS, (ITEMS[:, :3], ITEM_LABELS), "queries have dimension 4, the gallery has 3"),
        (
            spoiled(ROWS, 3, np.nan),
            LABELS,
            (ITEMS, ITEM_LABELS),
            r"row 3 of the queries holds NaN or infinity \(1 such",
        ),
        (ROWS, LABELS, (spoiled(ITEMS, [2, 5], 0.0), ITEM_LABELS), r"row 2 of the gallery holds only zeros \(2 such"),
        (ROWS, LABELS.astype(float), (ITEMS, ITEM_LABELS), "labels must be integers, got torch.float64"),
        (ROWS, LABELS, (ITEMS.astype(int), ITEM_LABELS), "gallery must be floats, got torch.int64"),
        (ROWS, LABELS + 50, (ITEMS, ITEM_LABELS), "gallery item of its label, got none among 12 queries"),
        (ROWS, LABELS, (ITEMS, ITEM_LABELS * 0), "two classes in the gallery, got 1 in 9 samples"),
        (ROWS[:0], LABELS[:0], (ITEMS, ITEM_LABELS), "got none in the queries"),
        (ROWS, LABELS, (ITEMS[:0], ITEM_LABELS[:0]), "got none in the gallery"),
        (ROWS, LABELS, ITEMS, r"gallery must be \(embeddings, labels\), got ndarray"),
    ],
)
def test_bad_queries_and_galleries_are_named(queries, labels, gallery, message):
    with pytest.raises(ValueError, match=message):
        query_gallery(queries, labels, gallery)


def test_precision_is_put_back_also_after_an_error():
    def fail_inside():
        with full_precision(torch.device("cpu")):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            raise RuntimeError

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(RuntimeError):
            fail_inside()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
