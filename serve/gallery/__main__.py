"""Galleries from a shell: `python -m serve.gallery build --from emb.parquet --name shop`."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import rich.console
import rich.progress
import rich.table

from cluster import command_line, embedding_table
from serve.gallery.items import check_id
from serve.gallery.reach import Offline, Reach, ReachError, Service

URL = "http://127.0.0.1:8000"
KEY = "ONETHRESHOLD_KEY"
BATCH = 500
"""Items of a request: some megabytes."""


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
    path = Path(options.file)
    made = embedding_table.made(path)
    model = reach.serves(options.made_by or (made.model if made else None))
    total = embedding_table.count(path)
    reach.create(options.name, None)
    with _progress() as bar:
        task = bar.add_task("adding", total=total)
        for ids, rows_BD, metadata in embedding_table.read(path, BATCH):
            for each in ids:
                _check(path, each)
            reach.add(options.name, model, ids, rows_BD, metadata)
            bar.advance(task, len(ids))
    print(f"{total:,} embeddings by {model} from {path} are in gallery {options.name}")


def _check(path: Path, name: str) -> None:
    try:
        check_id(name)
    except ValueError as error:
        raise ReachError(f"{path}: id {name[:100]!r}: {error}") from error


def _rebuild(reach: Reach, options: argparse.Namespace) -> None:
    if options.file:
        # All that can be refused, before what is there is deleted.
        made = embedding_table.made(Path(options.file))
        reach.serves(options.made_by or (made.model if made else None))
        for before in [each for each in reach.infos() if each["name"] == options.name]:
            reach.delete(options.name)
            reach.create(options.name, before["keep_images"])
        _build(reach, options)
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
