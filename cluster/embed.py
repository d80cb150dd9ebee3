"""Embeds a whole data set over the cluster: `python -m cluster.embed --model ... --data photos/ --out emb.parquet`."""

import csv
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import rich.progress

from cluster import command_line, embedding_table, registry, session, shared_storage, tracking
from cluster.embed_shards import Embedder, Model, Shard, Subject
from cluster.embedding_table import SHARD, Made
from dml import checkpoint
from dml.config import Config, DataConfig
from dml.data import datasets, folders
from dml.data.imageset import DataError, digest
from dml.names import unknown

MANIFEST = "manifest.json"
BAD = "bad.csv"


@dataclass(frozen=True)
class Options:
    """Embeds every image of a folder or a dataset: id, embedding and label as Parquet, for search, a gallery or you.

    --data photos/ takes all images beneath a folder; their ids are paths in it, and their labels the folders that they
    lie in. --out emb.parquet makes one file, any other name a folder of shards. What was embedded when it was stopped
    stays: the same command goes on. Files that are no images are listed in bad.csv beside the output.
    """

    model: str = f"models:/{registry.NAME}@{registry.ALIAS}"
    """A checkpoint folder, models:/NAME@ALIAS or models:/NAME/VERSION."""
    data: str = ""
    """A folder that every node sees, or a dataset: glyphs, digits. Default: all that the model was trained on."""
    out: str = ""
    """emb.parquet, or a folder; a path that every node sees."""
    workers: int = 0
    """Actors that embed. Default: one a GPU, without GPUs one a CPU."""
    cpus_per_worker: float = 1.0
    """CPUs of each, which also decode."""
    gpus_per_worker: float | None = None
    """GPUs of each, e.g. 0.5. Default: 1 when the cluster has any, else 0."""
    batch: int = 64
    """Images of a forward pass."""
    shard: int = 4096
    """Images of a shard, which is what a stop can lose."""
    quiet: bool = False
    """No progress bar."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = command_line.read(Options, sys.argv[1:] if argv is None else argv)
    with command_line.one_line_errors(status=2):
        _check(options)
        out = Path(options.out).absolute()
        folder, name = registry.fetch(options.model)
        loaded = checkpoint.load(folder)
        if options.model.startswith("models:"):
            model = Model(registry.pinned(name), tracking.connect())
        else:
            model = Model(str(folder.absolute()))
            name = f"{registry.NAME}@{name}"  # as a service of this folder calls it
        subject = _subject(options.data, loaded.config)
        made = Made(
            name,
            loaded.config.encoder.dim,
            hashlib.sha256((folder / "encoder.safetensors").read_bytes()).hexdigest(),
            subject.identity,
            len(subject),
            options.shard,
            _operating_points(folder),
        )
        single = out.suffix == ".parquet"
        parts = out.with_name(f"{out.name}.parts") if single else out
        if single and out.exists():
            raise ValueError(f"out: {out} is there already; name another file, or remove it")
        _open(parts, made)
    with command_line.one_line_errors():
        session.connect()
        _embed(options, model, subject, made, parts)
        file = out.with_name(f"{out.stem}.{BAD}") if single else parts / BAD
        bad = _list_bad(parts, subject.unnamed, file)
        rows = embedding_table.count(parts)
        if single:
            _join(parts, out, made)
        print(f"{rows:,} of {made.images:,} images embedded by {made.model} (D = {made.dim}) into {out}")
        if bad:
            command_line.warn(f"{bad:,} files are no readable images; {file} lists them with the reasons")
    return 0


def _check(options: Options) -> None:
    if not options.out:
        raise ValueError("out: name a file such as emb.parquet, or a folder")
    for name in ("batch", "shard", "cpus_per_worker"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name}: {getattr(options, name)} must be above 0")


def _subject(data: str, config: Config) -> Subject:
    """What is to be embedded, seen through the model's transform."""
    trained: DataConfig = config.data
    name = data or trained.dataset
    if name == "image_folder" and not data and trained.root:
        name = trained.root
    if name in datasets.DATASETS and name != "image_folder":
        chosen = trained.model_copy(update={"dataset": name, "root": None, "split_csv": None})
        found = datasets.DATASETS[name](chosen)
        labels = [found.classes[label] for label in found.labels_N]
        return Subject(chosen, "", [f"{name}/{row:06d}" for row in range(len(labels))], labels, found.identity)
    root = Path(name).expanduser().absolute()
    if not root.is_dir():
        valid = [each for each in datasets.DATASETS if each != "image_folder"]
        raise ValueError(f"data: {root} is not a folder, and {unknown('dataset', name, valid)}")
    ids, sizes, unnamed = _listed(root)
    if not ids:
        raise DataError(f"data: no image under {root}")
    firsts = [each.partition("/")[0] if "/" in each else None for each in ids]
    identity = digest(*(f"{each}:{size}" for each, size in zip(ids, sizes, strict=True)))
    return Subject(trained, str(root), ids, firsts, identity, unnamed)


def _listed(root: Path) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """Paths of the image files beneath a folder in order, sizes in bytes, and the files whose paths can be no ids."""
    known = folders.extensions()
    found, unnamed = [], []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in known and not name.startswith(".") and path.is_file():
                inside = path.relative_to(root).as_posix()
                shown = os.fsencode(inside).decode("utf-8", "backslashreplace")
                if shown == inside:
                    found.append((inside, path.stat().st_size))
                else:
                    unnamed.append((shown, "its name is not UTF-8"))
    found.sort()
    return [path for path, _ in found], [size for _, size in found], sorted(unnamed)


def _operating_points(folder: Path) -> list[dict[str, Any]]:
    file = folder / registry.OPERATING_POINTS
    points: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    return points


def _open(parts: Path, made: Made) -> None:
    """Makes the folder of shards, or refuses one that was made of something else."""
    manifest = parts / MANIFEST
    if manifest.is_file():
        before = json.loads(manifest.read_text())
        now = json.loads(json.dumps(asdict(made)))
        for name, value in now.items():
            if before.get(name) != value and name != "operating_points":
                raise ValueError(
                    f"out: {parts} holds shards of another run ({name} {str(before.get(name))[:40]}, now "
                    f"{str(value)[:40]}); give the same options to go on, or name another output"
                )
        return
    if parts.exists() and (not parts.is_dir() or any(parts.iterdir())):
        raise ValueError(f"out: {parts} exists and holds something else; name another output")
    parts.mkdir(parents=True, exist_ok=True)
    new = parts / f".{MANIFEST}"
    new.write_text(json.dumps(asdict(made), indent=2))
    new.replace(manifest)


def _embed(options: Options, model: Model, subject: Subject, made: Made, parts: Path) -> None:
    """Embeds the shards that are not there yet."""
    shared_storage.check(str(parts), "out")
    if subject.root:
        shared_storage.check_there(str(Path(subject.root, subject.ids[0])), "data")
    if not model.store:
        shared_storage.check_there(model.place, "model")
    total = -(-len(subject) // options.shard)
    todo = [number for number in range(total) if not (parts / SHARD.format(number)).is_file()]
    done = min(len(subject), (total - len(todo)) * options.shard)
    with _progress(quiet=options.quiet) as bar:
        task = bar.add_task("embedding", total=len(subject), completed=done)
        for row in _results(options, model, subject, made, parts, todo) if todo else ():
            bar.advance(task, int(row["images"]))


def _results(
    options: Options, model: Model, subject: Subject, made: Made, parts: Path, todo: Sequence[int]
) -> Iterator[dict[str, Any]]:
    total = ray.cluster_resources()
    gpus = options.gpus_per_worker if options.gpus_per_worker is not None else min(1.0, total.get("GPU", 0.0))
    each, there = (gpus, total.get("GPU", 0.0)) if gpus else (options.cpus_per_worker, total.get("CPU", 1.0))
    workers = min(len(todo), options.workers or max(1, int(there / each)))
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if getattr(handler, "stream", None) is sys.stderr:  # its file keeps what it says of each execution
            handler.setLevel(logging.ERROR)
    shards = [{"shard": Shard(number, *subject.part(number * options.shard, options.shard))} for number in todo]
    found = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
        Embedder,
        fn_constructor_args=(model, subject.config, subject.root, made, str(parts), options.batch),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=options.cpus_per_worker,
        num_gpus=gpus or None,
    )
    for row in found.iter_rows():
        if row["wrong"]:
            raise ValueError(row["wrong"])
        yield row


def _list_bad(parts: Path, unnamed: Sequence[tuple[str, str]], out: Path) -> int:
    """Writes the files that could not be embedded, if there are any, with the reasons; returns how many."""
    bad = [*unnamed, *(row for file in sorted(parts.glob("bad-*.json")) for row in json.loads(file.read_text()))]
    if bad:
        with out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file", "why"), *bad])
    return len(bad)


def _join(parts: Path, out: Path, made: Made) -> None:
    """One file of all shards, a shard in memory at a time; the shards are then removed."""
    import pyarrow.parquet as pq

    new = out.with_name(f".{out.name}.new")
    with pq.ParquetWriter(new, embedding_table.schema(made)) as writer:
        for file in embedding_table.files(parts):
            writer.write_table(pq.read_table(file))
    new.replace(out)
    shutil.rmtree(parts)


def _progress(*, quiet: bool) -> rich.progress.Progress:
    console = rich.console.Console(stderr=True)
    columns = (
        "{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    return rich.progress.Progress(*columns, console=console, disable=quiet or not console.is_terminal)


if __name__ == "__main__":
    raise SystemExit(main())
