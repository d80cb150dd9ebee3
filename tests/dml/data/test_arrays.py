"""Files of embeddings: what is read, and what is refused in words."""

import pickle
import re
import zipfile

import numpy as np
import pytest
import torch

from dml.data import arrays
from dml.data.imageset import DataError

ROWS = np.arange(12.0, dtype=np.float32).reshape(4, 3)


def file(tmp_path, **content):
    path = tmp_path / "rows.npz"
    np.savez(path, **content)
    return path


def test_integer_labels_become_dense_and_keep_their_names(tmp_path):
    found = arrays.read(file(tmp_path, embeddings=ROWS, labels=np.array([7, -2, 7, 100])))
    assert found.labels_N.tolist() == [1, 0, 1, 2]
    assert found.classes == ("-2", "7", "100")
    np.testing.assert_array_equal(found.embeddings_ND, ROWS)
    assert found.gallery is None


def test_text_labels_name_the_classes(tmp_path):
    found = arrays.read(file(tmp_path, embeddings=ROWS, labels=np.array(["owl", "cat", "owl", "dog"])))
    assert found.labels_N.tolist() == [2, 0, 2, 1]
    assert found.classes == ("cat", "dog", "owl")


def test_labels_mean_the_same_in_queries_and_gallery(tmp_path):
    labels = {"labels": np.array([5, 5, 9, 1]), "gallery_labels": np.array([9, 3])}
    found = arrays.read(file(tmp_path, embeddings=ROWS, gallery_embeddings=ROWS[:2], **labels))
    assert found.classes == ("1", "3", "5", "9")
    assert [found.classes[label] for label in found.gallery[1]] == ["9", "3"]


def test_what_was_written_is_read(tmp_path):
    arrays.write(tmp_path / "w.npz", torch.from_numpy(ROWS), torch.tensor([0, 2, 2, 0]), ("a", "b", "c"))
    found = arrays.read(tmp_path / "w.npz")
    assert (found.labels_N.tolist(), found.classes) == ([0, 2, 2, 0], ("a", "b", "c"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": ROWS}, "unknown array 'rows'; valid: embeddings, labels"),
        ({"labels": np.arange(4)}, "no array 'embeddings'"),
        ({"embeddings": ROWS[0]}, "embeddings must be float16, float32 or float64 (N, D) with at least one row, got"),
        ({"embeddings": ROWS.astype(int)}, "with at least one row, got int64 of shape (4, 3)"),
        pytest.param(
            {"embeddings": ROWS.astype(np.longdouble)},
            f"with at least one row, got {np.dtype(np.longdouble)} of shape (4, 3)",
            marks=pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="is float64 here"),
        ),
        ({"embeddings": ROWS[:0], "labels": np.arange(0)}, "with at least one row, got float32 of shape (0, 3)"),
        (
            {
                "embeddings": ROWS,
                "gallery_embeddings": ROWS[:0],
                "labels": np.arange(4),
                "gallery_labels": np.arange(0),
            },
            "gallery_embeddings must be float16, float32 or float64 (N, D) with at least one row",
        ),
        ({"embeddings": ROWS, "labels": np.ones(4)}, "labels must be integers or text (N,), got float64"),
        ({"embeddings": ROWS, "gallery_labels": np.arange(4)}, "gallery_embeddings and gallery_labels go together"),
        ({"embeddings": ROWS, "names": np.array(["a", "b"])}, "names must be text (4,), got <U1 of shape (2,)"),
        ({"embeddings": ROWS, "names": np.array(list("abca"))}, "names must differ, but 'a' names 2 rows"),
        (
            {"embeddings": ROWS, "labels": np.array([0, 1, 2, 3]), "classes": np.array(["x", "y"])},
            "with classes, labels must be integers from 0 to 1",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=re.escape(message)):
        arrays.read(file(tmp_path, **content))


def test_numbers_of_another_machine_are_read(tmp_path):
    found = arrays.read(file(tmp_path, embeddings=ROWS.astype(">f4"), labels=np.arange(4).astype(">i8")))
    assert (found.embeddings_ND.dtype, found.embeddings_ND.tolist()) == (torch.float32, ROWS.tolist())
    assert found.labels_N.tolist() == [0, 1, 2, 3]


def test_files_that_are_no_npz_are_named(tmp_path):
    np.save(tmp_path / "one.npy", ROWS)
    (tmp_path / "empty.npz").touch()
    header = b"\x93NUMPY\x01\x00\x0a\x00{'descr': (\n"  # of an array, broken off
    with zipfile.ZipFile(tmp_path / "torn.npz", "w") as archive:
        archive.writestr("embeddings.npy", header)
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match=rf"{path.name}: not a \.npz file of plain arrays"):
            arrays.read(path)


def test_pickled_objects_are_not_opened(tmp_path):
    with pytest.raises(DataError, match=r"not a \.npz file of plain arrays"):
        arrays.read(file(tmp_path, embeddings=np.array([{"a": 1}], dtype=object)))
    (tmp_path / "p.npz").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match=r"not a \.npz file of plain arrays"):
        arrays.read(tmp_path / "p.npz")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        arrays.read(tmp_path / "absent.npz")
