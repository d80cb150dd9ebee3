"""Galleries from a shell: `python -m serve.gallery build --from emb.parquet --name shop`."""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
import rich.table

from cluster import command_line, embedding_table
from serve.gallery.items import check_id, check_metadata, text_of
from serve.gallery.limits import GalleryLimits
from serve.gallery.reach import Offline, Reach, ReachError, Service

URL = "http://127.0.0.1:8000"
KEY = "ONETHRESHOLD_KEY"
BATCH = 500
"""Items of a request: some megabytes."""
_LIMITED = "where the service allows that, delete the gallery and build it"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    with command_line.one_line_errors(status=2), _reach(options) as reach:
        options.run(reach, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.gallery",
        description="Galleries of a running service, or of a folder that no service is using (--store).",
        epilog=f"An API key is taken from the environment variable {KEY}, or --key.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="add the embeddings of a file to a gallery, which is made if need be")
    build.add_argument("--name", required=True, help="of the gallery")
    _add_file(build, required=True)
    build.set_defaults(run=_build)
    rebuild = commands.add_parser("rebuild", help="make a gallery one of the model that is served now")
    rebuild.add_argument("name", help="of the gallery")
    _add_file(rebuild, required=False)
    rebuild.add_argument("--model", default="", help="with --store: what is to embed the kept images")
    rebuild.set_defaults(run=_rebuild)
    commands.add_parser("list", help="show all galleries").set_defaults(run=_list)
    delete = commands.add_parser("delete", help="delete a gallery with its items and images")
    delete.add_argument("name", help="of the gallery")
    delete.set_defaults(run=_delete)
    for command in commands.choices.values():
        command.add_argument("--url", default=URL, help="of the service (default: %(default)s)")
        command.add_argument("--key", default="", help=f"API key (default: ${KEY})")
        command.add_argument("--store", default="", help="a folder of galleries, in place of a service")
    return parser


def _add_file(parser: argparse.ArgumentParser, *, required: bool) -> None:
    help_ = "Parquet file or folder of python -m cluster.embed, or any with the columns id and embedding"
    parser.add_argument("--from", dest="file", default="", required=required, help=help_)
    parser.add_argument("--made-by", default="", help="the model that made them, where the file does not say it")


@contextmanager
def _reach(options: argparse.Namespace) -> Iterator[Reach]:
    if not options.store:
        yield Service(options.url, options.key or os.environ.get(KEY, ""))
        return
    if not Path(options.store).is_dir():
        raise ReachError(f"store: {options.store} is not a folder")
    offline = Offline(Path(options.store), getattr(options, "model", ""))
    try:
        yield offline
    finally:
        offline.close()


def _build(reach: Reach, options: argparse.Namespace) -> None:
    _fill(reach, options, _checked(reach, options))


def _fill(reach: Reach, options: argparse.Namespace, model: str) -> None:
    path = Path(options.file)
    reach.create(options.name, None)
    for ids, rows_BD, metadata in _batches("adding", path):
        reach.add(options.name, model, ids, rows_BD, metadata)
    print(f"{embedding_table.count(path):,} embeddings by {model} from {path} are in gallery {options.name}")


def _checked(reach: Reach, options: argparse.Namespace, limits: GalleryLimits | None = None) -> str:
    """The model of a file of which a gallery takes every embedding; none was added yet."""
    path, dim = Path(options.file), None
    made = embedding_table.made(path)
    model = options.made_by or (made.model if made else None)
    reach.serves(model)  # before a long file is read
    total = embedding_table.count(path)
    if limits is not None and total > limits.items:
        raise ReachError(f"{path} has {total:,} embeddings, more than {limits.items:,}; {_LIMITED}")
    for ids, rows_BD, metadata in _batches("checking", path):
        dim = dim or rows_BD.shape[1]
        if rows_BD.shape[1] != dim:
            raise ReachError(f"{path}: embeddings must be of one length, got {dim} and {rows_BD.shape[1]}")
        norms_B = np.linalg.norm(rows_BD.astype(np.float64), axis=1)
        for each, norm, more in zip(ids, norms_B.tolist(), metadata, strict=True):
            try:
                _check(each, norm, more, limits)
            except ValueError as error:
                raise ReachError(f"{path}: id {each[:100]!r}: {error}") from error
        for name, count in Counter(ids).items():
            if count > 1:
                raise ReachError(f"{path}: the id {name[:100]!r} comes {count} times")
    return reach.serves(model, dim)


def _check(name: str, norm: float, metadata: dict[str, Any], limits: GalleryLimits | None) -> None:
    check_id(name)
    check_metadata(metadata)
    if not math.isfinite(norm) or norm == 0:
        raise ValueError(f"its embedding has the norm {norm:g}; it needs finite numbers that are not all 0")
    if limits is not None and len(text_of(metadata).encode()) > limits.metadata_bytes:
        raise ValueError(f"its metadata is longer than {limits.metadata_bytes:,} bytes of JSON; {_LIMITED}")


def _batches(doing: str, path: Path) -> Iterator[embedding_table.Batch]:
    with _progress() as bar:
        task = bar.add_task(doing, total=embedding_table.count(path))
        for batch in embedding_table.read(path, BATCH):
            yield batch
            bar.advance(task, len(batch[0]))


def _rebuild(reach: Reach, options: argparse.Namespace) -> None:
    if options.file:
        # All that can be refused, before what is there is deleted.
        model = _checked(reach, options, GalleryLimits())
        for before in [each for each in reach.infos() if each["name"] == options.name]:
            reach.delete(options.name)
            reach.create(options.name, before["keep_images"])
        _fill(reach, options, model)
        return
    with _progress() as bar:
        task = bar.add_task("embedding", total=None)
        changed = reach.rebuild(options.name, lambda done, of: bar.update(task, completed=done, total=of))
    print(f"gallery {options.name} {'is now' if changed else 'was already'} one of the present model")


def _list(reach: Reach, options: argparse.Namespace) -> None:
    table = rich.table.Table("gallery", "items", "model", "images", "index", "recall@10", box=None)
    for info in reach.infos():
        index = info["index"]
        items, images = f"{info['items']:,}", f"{info['images']:,}" if info["keep_images"] else "not kept"
        table.add_row(info["name"], items, info["model"] or "", images, index["kind"], f"{index['recall']:.3f}")
    rich.console.Console().print(table if table.row_count else "no galleries")


def _delete(reach: Reach, options: argparse.Namespace) -> None:
    reach.delete(options.name)
    print(f"gallery {options.name} is deleted")


@contextmanager
def _progress() -> Iterator[rich.progress.Progress]:
    console = rich.console.Console(stderr=True)
    columns = ("{task.description}", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar


if __name__ == "__main__":
    raise SystemExit(main())
