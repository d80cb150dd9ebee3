"""Neighbours against a plain loop, by faiss and by whole rows of similarities, which must find the same."""

import numpy as np
import pytest
import torch

from dml.metrics import neighbours
from dml.metrics.neighbours import nearest


def unit(n, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)


@pytest.fixture(params=["faiss", "whole rows"])
def search(request, monkeypatch):
    if request.param == "whole rows":
        monkeypatch.setattr(neighbours, "FAISS_K", 0)
        monkeypatch.setattr(neighbours, "ENTRIES", 200)
        monkeypatch.setattr(neighbours, "_SORTED", 80)
    return nearest


@pytest.mark.parametrize("k", [1, 4, 30])
def test_are_the_most_similar_rows_best_first(search, k):
    queries, gallery = unit(23, seed=1), unit(30, seed=2)
    similarity_QK, ids_QK = search(queries, gallery, k)
    for query, similarities, ids in zip(queries.double(), similarity_QK, ids_QK, strict=True):
        expected = sorted(((float(query @ row), i) for i, row in enumerate(gallery.double())), reverse=True)[:k]
        assert ids.tolist() == [i for _, i in expected]
        assert similarities.tolist() == pytest.approx([s for s, _ in expected], abs=1e-6)
    assert (similarity_QK.dtype, ids_QK.dtype) == (torch.float32, torch.int64)


def test_a_row_is_never_its_own_neighbour_however_many_duplicates_push_it_out(search):
    rows = unit(4).repeat(12, 1)
    similarity_QK, ids_QK = search(rows, rows, 5, exclude_Q=torch.arange(48))
    assert ids_QK.shape == (48, 5)
    assert not (ids_QK == torch.arange(48)[:, None]).any()
    assert (ids_QK % 4 == torch.arange(48)[:, None] % 4).all()
    assert all(len(set(ids)) == 5 for ids in ids_QK.tolist())
    torch.testing.assert_close(similarity_QK, torch.ones(48, 5))


def test_a_chosen_row_is_left_out_and_no_other(search):
    rows = unit(20)
    _, everyone = search(rows[[3, 7]], rows, 20)
    _, others = search(rows[[3, 7]], rows, 19, exclude_Q=torch.tensor([5, 7]))
    assert others.tolist() == [[i for i in ids if i != out] for ids, out in zip(everyone.tolist(), (5, 7), strict=True)]


def test_k_beyond_the_gallery_means_all_of_it(search):
    rows = unit(6)
    assert search(rows, rows, 99)[1].shape == (6, 6)
    assert search(rows, rows, 99, exclude_Q=torch.arange(6))[1].shape == (6, 5)


def test_similarities_of_every_size_and_sign_keep_their_order(search):
    gallery = torch.tensor([[s] for s in (0.0, -1.0, 1e-30, -1e-30, 1.0, 0.5, 0.5000001, -0.5, 1e-7)])
    similarity_QK, ids_QK = search(torch.ones(1, 1), gallery, 9)
    assert ids_QK[0].tolist() == [4, 6, 5, 8, 2, 0, 3, 7, 1]
    assert torch.equal(similarity_QK[0], gallery[ids_QK[0], 0])


def test_no_query_has_no_neighbours(search):
    assert search(unit(0), unit(5), 3)[1].shape == (0, 3)


def test_widths_of_floats_and_strided_queries(search):
    rows = unit(15).half()
    expected = search(rows.float()[::2].contiguous(), rows.float(), 4)[1]
    assert torch.equal(search(rows[::2], rows, 4)[1], expected)
    assert torch.equal(search(rows.double()[::2], rows.double(), 4)[1], expected)


@pytest.mark.parametrize(("k", "rows", "out"), [(0, 5, False), (-1, 5, False), (1, 0, False), (1, 1, True)])
def test_nothing_to_find_is_an_error(search, k, rows, out):
    with pytest.raises(ValueError, match="k must be at least 1 in a gallery with a row to find"):
        search(unit(1), unit(rows), k, exclude_Q=torch.zeros(1, dtype=torch.int64) if out else None)


def test_the_callers_faiss_threads_are_kept():
    import faiss

    before = faiss.omp_get_max_threads()
    nearest(unit(5), unit(5), 1)
    assert faiss.omp_get_max_threads() == before


def test_ids_fit_beside_a_similarity():
    # The bits that a float64 has beyond a float32 number the rows: more than any memory holds.
    assert np.float64(np.nextafter(np.float32(1), np.float32(2))).view(np.int64) - np.float64(1).view(np.int64) == 2**29
