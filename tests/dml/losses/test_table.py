"""The table of losses in docs/losses.md."""

from pathlib import Path

import pytest

from dml import losses
from dml.losses.table import papers, table

DOCS = Path(__file__).parents[3] / "docs" / "losses.md"


def test_the_committed_table_is_up_to_date() -> None:
    assert DOCS.read_text() == table(), "remake it: python -m dml.losses.table > docs/losses.md"


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_cites_its_paper(name: str) -> None:
    assert papers(losses.LOSSES[name])


def test_a_row_says_what_a_loss_needs_and_takes() -> None:
    (row,) = [line for line in table().splitlines() if "[`margin`]" in line]
    assert row.startswith("| [`margin`](../dml/losses/margin.py) | Positives within a boundary")
    assert " | margin 0.2, beta 1.2 | num_classes | distance_weighted | yes | Wu, Manmatha, " in row


def test_every_file_it_names_is_there() -> None:
    for name, cls in losses.LOSSES.items():
        path = f"../{cls.__module__.replace('.', '/')}.py"
        assert f"[`{name}`]({path})" in table()
        assert (DOCS.parent / path).is_file()
