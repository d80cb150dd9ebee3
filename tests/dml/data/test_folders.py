"""People's own images: what is read, what is passed over, and what each mistake is told."""

from pathlib import Path

import pytest
from PIL import Image

from dml.config import DataConfig
from dml.data import datasets
from dml.data.datasets import DataError
from dml.data.folders import image_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (10 + number, 8), (200, 0, number)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def read(root: Path, **changes: object) -> datasets.Collection:
    return image_folder(DataConfig.model_validate({"dataset": "image_folder", "root": str(root), **changes}))


def table(root: Path, *rows: str, header: str = "path,label,split") -> str:
    path = root.parent / "split.csv"
    path.write_text("\n".join([header, *rows]))
    return str(path)


def test_a_folder_is_a_class_and_depth_does_not_matter(root: Path) -> None:
    (root / "dog" / "2024" / "may").mkdir(parents=True)
    Image.new("L", (300, 5)).save(root / "dog" / "2024" / "may" / "LONG.JPG", "JPEG")
    data = read(root, channels=3)
    assert data.classes == ("cat", "dog")
    assert data.labels_N.tolist() == [0, 0, 1, 1, 1]
    shapes = [tuple(image.shape) for image in data.source.images(data.labels_N.nonzero()[0])]
    assert shapes == [(3, 8, 10), (3, 8, 11), (3, 5, 300)]


def test_hidden_and_other_files_are_passed_over(root: Path) -> None:
    (root / "cat" / ".DS_Store").write_bytes(b"x")
    (root / "cat" / "._0.png").write_bytes(b"x")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "cat" / ".thumbs").mkdir()
    (root / "cat" / ".thumbs" / "0.png").write_bytes(b"x")
    (root / ".git").mkdir()
    (root / "readme.md").write_text("x")
    assert read(root).labels_N.tolist() == [0, 0, 1, 1]


def test_no_root_or_a_wrong_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs data\.root"):
        image_folder(DataConfig(dataset="image_folder"))
    with pytest.raises(DataError, match="nowhere is not a folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no folders; it needs one folder of images a class"):
        read(tmp_path)


def test_class_folders_without_images_are_counted_and_named(root: Path) -> None:
    (root / "bird").mkdir()
    with pytest.raises(DataError, match=r"1 of 3 class folders .* hold no image: 'bird'; known extensions: .*\.png"):
        read(root)


def test_unreadable_files_are_counted_and_the_first_are_named(root: Path) -> None:
    for number in range(7):
        (root / "dog" / f"bad{number}.jpg").write_text("text")
    (root / "cat" / "empty.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read(root)
    message = str(caught.value)
    assert "8 of 12 files are no readable images" in message
    assert f"class 'cat': {root / 'cat' / 'empty.png'}: not an image in a known format" in message
    assert f"class 'dog': {root / 'dog' / 'bad0.jpg'}" in message
    assert "... and 3 more" in message


def test_a_file_that_breaks_off_is_named_when_it_is_read(root: Path) -> None:
    Image.effect_noise((64, 64), 50).save(root / "dog" / "cut.png")
    data = (root / "dog" / "cut.png").read_bytes()
    (root / "dog" / "cut.png").write_bytes(data[: len(data) // 2])
    whole = read(root).take([0, 1])
    with pytest.raises(DataError, match=r"class 'dog': .*cut\.png: not decodable: .*truncated"):
        whole.images(range(5))


def test_a_csv_gives_labels_and_splits(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.gif"
    Image.new("L", (4, 4)).save(elsewhere)
    path = table(
        root, "cat/0.png,pets,train", "dog/0.png,pets,train", "", f"{elsewhere},other,test", "cat/1.png,other,test"
    )
    data = read(root, split_csv=path)
    assert data.classes == ("other", "pets")
    assert data.labels_N.tolist() == [1, 1, 0, 0]
    assert data.assigned == {"pets": "train", "other": "test"}
    splits = datasets.load(DataConfig(dataset="image_folder", root=str(root), split_csv=path))
    assert (splits.train.classes, splits.val.classes, splits.test.classes) == (("pets",), (), ("other",))


def test_a_csv_from_a_spreadsheet_works(root: Path) -> None:
    path = root.parent / "split.csv"
    path.write_bytes("\ufeffsplit,path,label,note\r\n train ,cat/0.png, Hund & Katz,x\r\n".encode())
    assert read(root, split_csv=str(path)).classes == ("Hund & Katz",)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["cat/0.png,cat,train", "cat/9.png,cat,train"], r"row 3: no file .*cat/9\.png"),
        (["cat/0.png,cat,train", "cat/1.png,cat,val"], "row 3: class 'cat' is in val here and in train in row 2"),
        (["cat/0.png,cat,train", "cat/0.png,dog,train"], r"row 3: .*0\.png was already listed in row 2"),
        (["cat/0.png,cat,tran"], "row 2: unknown split 'tran'; valid: train"),
        (["cat/0.png,,train"], "row 2: label is empty"),
        ([",cat,train"], "row 2: path is empty"),
        (["cat/0.png,cat"], "row 2: unknown split ''"),
        ([], "lists no images"),
    ],
)
def test_a_faulty_row_is_named(rows: list[str], message: str, root: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(root, split_csv=table(root, *rows))


def test_a_csv_without_its_columns_or_missing_is_named(root: Path) -> None:
    with pytest.raises(DataError, match="no column label, split; needs the header path,label,split"):
        read(root, split_csv=table(root, "cat/0.png", header="path,class"))
    with pytest.raises(DataError, match=r"gone\.csv is not a file"):
        read(root, split_csv=str(root / "gone.csv"))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("Käfer".encode("latin-1"), "split.csv: not a CSV file in UTF-8 after row 0 .*can't decode byte 0xe4"),
        (b"x" * 150_000, "split.csv: not a CSV file in UTF-8 after row 2 .*field larger than field limit"),
    ],
    ids=["Latin-1", "a field without end"],
)
def test_a_csv_that_cannot_be_parsed_is_named(label: bytes, message: str, root: Path) -> None:
    path = root.parent / "split.csv"
    path.write_bytes(b"path,label,split\ncat/0.png,cat,train\ncat/1.png," + label + b",train\n")
    with pytest.raises(DataError, match=message):
        read(root, split_csv=str(path))
