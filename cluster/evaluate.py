"""Measures a model, or embeddings of any model, on classes it was not trained on: `python -m cluster.evaluate`."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer

from cluster import command_line, measure, registry, report_table, session, shared_storage, subjects, train
from cluster.delivery import without_password
from cluster.tracking import Store, runs_dir, unsent_warning
from dml import gather, report


@dataclass(frozen=True)
class Options:
    """Measures how well one threshold holds, and all else that is known of embeddings: a table, metrics.json, figures.

    A model on its own test classes: --model models:/onethreshold@champion, or a checkpoint folder. On your photographs:
    add --data image_folder --root photos/. Embeddings of any other model: --embeddings file.npz with the arrays
    embeddings (N, D) and labels (N,). Your labelled pairs: --pairs pairs.csv with the header a,b,same, where a and b
    are paths of images beside the file (with --model) or entries of the array names (with --embeddings).
    """

    model: str = ""
    """A checkpoint folder, models:/NAME@ALIAS or models:/NAME/VERSION."""
    data: str = ""
    """Dataset to embed: glyphs, digits or image_folder. Default: the one that the model was trained on."""
    root: str = ""
    """image_folder only: the folder that holds one folder of images a class."""
    split: Literal["auto", "train", "val", "test", "all"] = "auto"
    """Classes to measure. auto: test for the data that the model was trained on, all for any other."""
    embeddings: str = ""
    """A .npz file to measure instead of a model's output; also with gallery_embeddings and gallery_labels."""
    calibration: str = ""
    """A .npz file of other classes: thresholds are set there, and put to the test on --embeddings."""
    pairs: str = ""
    """A CSV file of labelled pairs to measure on: a,b,same."""
    far: tuple[float, ...] = (0.1, 0.01, 0.001)
    """False accept rates to find thresholds for."""
    distance: Literal["model", "euclidean", "cosine"] = "model"
    """Distance of the thresholds. Default: the model's; Euclidean for --embeddings."""
    skip: tuple[report.Part, ...] = ()
    """Parts to leave out; clustering and classification take longest where classes are many."""
    figures: bool = True
    """Draw the figures."""
    save_embeddings: bool = False
    """Write embeddings.npz too, which --embeddings and --calibration read."""
    workers: int = 0
    """Ranks of Ray Train that share the work; 0 works in this process, without Ray."""
    cpus_per_worker: float | None = None
    """CPUs of each rank; unless given, its GPU's share of the node's, or 1 without GPUs."""
    gpus_per_worker: float | None = None
    """GPUs of each rank; 1 when the cluster has GPUs, else 0."""
    storage: str = ""
    """Where ranks leave their results: a path that every node sees, or a URI. Default: runs/ray."""
    out: str = ""
    """Folder for metrics.json and figures/. Default: runs/evaluate-TIME."""
    track: bool = False
    """Log metrics and figures to MLflow as well."""
    seed: int = 0
    """Of k-means, classification and the map."""

    @property
    def parts(self) -> measure.Parts:
        """What to measure and to write."""
        return measure.Parts(self.skip, self.figures, self.save_embeddings, self.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = command_line.read(Options, sys.argv[1:] if argv is None else argv)
    with command_line.one_line_errors(status=2):
        source = _source(options)
        name = command_line.stamped("evaluate")
        out = Path(options.out or runs_dir() / name).absolute()
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"out: {out} exists and is not empty; name a new folder")
    with command_line.one_line_errors(), tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        if options.workers:
            _over_ranks(source, options, made, name)
        else:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            measure.write(source, made, options.parts, device=device, shown=True)
        out.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made, out, dirs_exist_ok=True)
        found = json.loads((out / "metrics.json").read_text())
        report_table.print_report(found)
        print(f"written to {out}")
        if options.track:
            _track(found, out, name)
    return 0


def _source(options: Options) -> subjects.Source:
    """What to measure, with absolute paths, since ranks run in other folders."""
    given = {field.name: getattr(options, field.name) for field in fields(subjects.Source)}
    for name in ("model", "root", "embeddings", "calibration", "pairs"):
        if given[name] and not given[name].startswith("models:"):
            given[name] = session.local_path(given[name])
    if options.model.startswith("models:"):
        registry.parse(options.model)
    return subjects.Source(**given)


def _over_ranks(source: subjects.Source, options: Options, out: Path, name: str) -> None:
    """`measure.write` over the ranks of a Ray Train job, whose first one hands its folder back as a checkpoint."""
    session.connect()
    resources = session.Resources.of(options.workers, options.cpus_per_worker, options.gpus_per_worker)
    storage = session.storage(options.storage)
    shared_storage.check(storage)
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"source": source, "parts": options.parts, "store": Store.open().uri},
        scaling_config=resources.scaling(),
        torch_config=resources.backend(),
        run_config=ray.train.RunConfig(name=name, storage_path=storage),
    )
    checkpoint = train.finish(trainer).checkpoint
    assert checkpoint is not None
    checkpoint.to_directory(str(out))


def _rank(settings: dict[str, Any]) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = settings["store"]
    device = session.use_rank_device()
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        measure.write(settings["source"], made, settings["parts"], device=device, group=gather.default_group())
        kept = ray.train.Checkpoint.from_directory(made) if made.exists() else None
        ray.train.report({}, checkpoint=kept)


def _track(found: Mapping[str, Any], out: Path, name: str) -> None:
    run = Store.open().start(name, params={"title": found["title"]}, tags={"kind": "evaluate"})
    with run.closing() as record:
        record.summary({key: value for key, value in found["metrics"].items() if value is not None})
        record.files(out)
    print(f"MLflow run {run.run_id} in {without_password(run.uri)}")
    if warning := unsent_warning(run.unsent):
        command_line.warn(warning)


if __name__ == "__main__":
    raise SystemExit(main())
