"""Tables of embeddings as Parquet: one file, or a folder of shards, with the model that made them in its metadata."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dml.data.imageset import DataError

SHARD = "shard-{:06d}.parquet"
_KEY = b"onethreshold"
Batch = tuple[list[str], npt.NDArray[np.float32], list[dict[str, Any]]]
"""Ids, embeddings (B, D) and the other columns of some rows."""


@dataclass(frozen=True)
class Made:
    """How a table was made, kept in the metadata of its Parquet schema.

    Attributes:
        model: label of the model, as a service that serves it says it: onethreshold@3.
        dim: D.
        weights: digest of the encoder's weights.
        data: digest of what was embedded.
        images: how many there were.
        shard_images: images of a shard.
        operating_points: of the model, as JSON-like values.
    """

    model: str
    dim: int
    weights: str
    data: str
    images: int
    shard_images: int
    operating_points: Sequence[Mapping[str, Any]] = ()


def schema(made: Made) -> Any:
    """The Arrow schema: id, embedding (float32, D) and label, which is null where none is known."""
    import pyarrow as pa

    columns = [("id", pa.string()), ("embedding", pa.list_(pa.float32(), made.dim)), ("label", pa.string())]
    return pa.schema(columns, metadata={_KEY: json.dumps(asdict(made))})


def table(made: Made, ids: Sequence[str], labels: Sequence[str | None], rows_BD: npt.NDArray[np.float32]) -> Any:
    """Embeddings (B, D) as an Arrow table."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(rows_BD, dtype=np.float32).reshape(-1))
    embeddings = pa.FixedSizeListArray.from_arrays(flat, made.dim)
    return pa.Table.from_arrays(
        [pa.array(ids, pa.string()), embeddings, pa.array(labels, pa.string())], schema=schema(made)
    )


def files(path: Path) -> list[Path]:
    """The Parquet files of a table, in order.

    Raises:
        FileNotFoundError: there is no such file, and no folder with shards.
    """
    found = sorted(path.glob(SHARD.partition("{")[0] + "*.parquet")) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"{path}: no Parquet file, and no folder of them that python -m cluster.embed has made")
    return found


def made(path: Path) -> Made | None:
    """How a table was made; None where its metadata does not say, as in those of other programs.

    Raises:
        FileNotFoundError: as `files`.
        DataError: no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    [file, *_] = files(path)
    try:
        metadata = pq.read_schema(file).metadata or {}
    except pa.ArrowException as error:
        raise DataError(f"{file}: no Parquet file ({error})") from error
    return Made(**json.loads(metadata[_KEY])) if _KEY in metadata else None


def count(path: Path) -> int:
    """Rows of a table."""
    import pyarrow.parquet as pq

    return sum(int(pq.read_metadata(file).num_rows) for file in files(path))


def read(path: Path, batch: int) -> Iterator[Batch]:
    """Ids, embeddings (B, D) and the other columns, row by row and without nulls, a batch at a time.

    Any table with a column id and a column embedding (a list of floats, all of one length) can be read.

    Raises:
        DataError: a column is missing or of another kind; the message names file and column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files(path):
        with pq.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            for name in ("id", "embedding"):
                if name not in names:
                    raise DataError(f"{file}: no column {name!r}; it has {', '.join(names)}")
            for part in opened.iter_batches(batch):
                ids = part.column("id").to_pylist()
                if not all(isinstance(each, str) for each in ids):
                    raise DataError(f"{file}: the column id must be text without nulls")
                rest = part.drop_columns(["id", "embedding"]).to_pylist()
                others = [{name: value for name, value in row.items() if value is not None} for row in rest]
                yield ids, _rows(file, part.column("embedding"), pa), others


def _rows(file: Path, column: Any, pa: Any) -> npt.NDArray[np.float32]:
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type) or column.null_count:
        raise DataError(f"{file}: the column embedding must be lists of floats without nulls, got {kind}")
    flat = column.flatten()
    dim = len(flat) // max(1, len(column))
    lengths = {len(each) for each in column}
    if lengths - {dim} or flat.null_count:
        raise DataError(f"{file}: embeddings must be of one length, without nulls; got lengths {sorted(lengths)[:5]}")
    rows: npt.NDArray[np.float32] = flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, dim)
    return rows
