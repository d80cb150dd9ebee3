"""New operating points for a model from a team's own labelled pairs: `python -m serve.calibrate --pairs pairs.csv`.

Nothing is trained, and services that run take them up at their next look at the registry.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import tyro

from cluster import command_line, registry, tracking
from dml.data.images import ImageError
from dml.metrics.distance_histograms import DistanceHistograms
from dml.metrics.labelled_pairs import (
    LabelledPairs,
    LabelledRates,
    calibrate_labelled,
    labelled_pair_distances,
    read_pairs,
    transfer_labelled,
)
from dml.metrics.operating_points import OperatingPoint, UnreachableFARError, check_targets
from serve.calibration import REGISTERED, Calibration
from serve.calibrations import Calibrations
from serve.client import Client, ServiceError
from serve.model import CheckpointEmbedder, Execution

Embed: TypeAlias = Callable[[Sequence[Path]], npt.NDArray[np.float32]]
BATCH = 32
"""Images that are decoded, and embedded, at a time."""
FEW = 10
"""False accepts that a threshold should rest on: fewer, and another sample of pairs puts it elsewhere."""


@dataclass(frozen=True)
class Options:
    """Sets operating points of a model from labelled pairs, lists those that were set, or goes back to earlier ones.

    set (the default) reads --pairs, a CSV file with the columns a, b (image files, from the CSV's folder) and same
    (1 or 0). revert takes the id of a calibration that list shows, or "registered".
    """

    action: Annotated[tyro.conf.Positional[Literal["set", "list", "revert"]], tyro.conf.arg(metavar="ACTION")] = "set"
    id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ID")] = ""
    pairs: str = ""
    """CSV file: a,b,same."""
    model: str = f"models:/{registry.NAME}@{registry.ALIAS}"
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the path of a checkpoint folder."""
    far: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    """False accept rates to set thresholds for."""
    url: str = ""
    """A running service that embeds the images with this very model; unset, they are embedded here. Its API key is
    taken from the environment variable ONETHRESHOLD_KEY."""
    dry_run: bool = False
    """Shows the new operating points and stores nothing."""


@dataclass(frozen=True)
class Found:
    """What labelled pairs say of a model.

    Attributes:
        calibration: the new operating points; None when the pairs are too few for any target.
        before: what the thresholds in use do to these pairs.
        remarks: on targets that the pairs are too few for, in words.
    """

    calibration: Calibration | None
    before: tuple[LabelledRates, ...]
    remarks: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = command_line.read(Options, sys.argv[1:] if argv is None else argv)
    with command_line.one_line_errors(status=2):
        _check(options)
    try:
        with command_line.one_line_errors():
            if not options.model.startswith("models:"):
                label = f"{registry.NAME}@{Path(options.model).resolve().name}"  # as serve.model has it
                return _run(options, Path(options.model), label, None)
            with tracking.one_line(tracking.connect()):
                version = registry.find(options.model)
                if version is None:
                    raise ValueError(f"{options.model} is not in the MLflow registry")
                return _run(options, registry.download(version), version.label, version)
    except ServiceError as error:
        raise SystemExit(f"error: {options.url}: {error.message}") from None


def measure(
    pairs: LabelledPairs, folder: Path, embed: Embed, used: Calibration | None, far: Sequence[float], source: str
) -> Found:
    """Embeds the images of labelled pairs, each once, and calibrates on them.

    Args:
        pairs: of image files.
        folder: that relative paths start from.
        embed: embeddings (B, D) of image files.
        used: the calibration in use.
        far: targets.
        source: what the new calibration says that it was made from.

    Raises:
        ValueError: pairs of one kind only, a target that is no rate, or what `embed` raises.
    """
    names = sorted({*pairs.a, *pairs.b})
    embeddings_ND = embed([folder / name for name in names])
    before = transfer_labelled(used.points if used else (), pairs, names, embeddings_ND)
    points: list[OperatingPoint] = []
    remarks = []
    negatives = pairs.same.count(False)
    for target in sorted(far, reverse=True):
        wanted = f"about {FEW / target:,.0f} negatives would do, {negatives:,} are there"
        try:
            points += calibrate_labelled(pairs, names, embeddings_ND, far=[target])
        except UnreachableFARError as error:
            remarks.append(f"{error}; {wanted}")
            continue
        if target * negatives < FEW:
            remarks.append(f"the threshold for FAR {target:g} rests on fewer than {FEW} false accepts; {wanted}")
    if not points:
        return Found(None, before, tuple(remarks))
    histograms = DistanceHistograms.of(labelled_pair_distances(pairs, names, embeddings_ND))
    calibration = Calibration.of([asdict(point) for point in points], histograms, source, int(time.time()))
    offered = {point.far_target for point in points}
    gone = [f"{point.far_target:g}" for point in (used.points if used else ()) if point.far_target not in offered]
    if gone:
        remarks.append(f"requests that ask for FAR {' or '.join(gone)} will be refused: --far sets further points")
    return Found(calibration, before, tuple(remarks))


def _check(options: Options) -> None:
    if options.action == "set" and not options.pairs:
        raise ValueError("pairs: name the CSV file of labelled pairs, --pairs pairs.csv")
    if options.action == "set" and not Path(options.pairs).is_file():
        raise ValueError(f"pairs: there is no file {options.pairs!r}")
    if options.action == "revert" and not options.id:
        raise ValueError(f"revert takes the id of a calibration, or {REGISTERED}; list shows them")
    if options.action != "revert" and options.id:
        raise ValueError(f"{options.action} takes no id, got {options.id!r}")
    check_targets(options.far)
    if not options.model.startswith("models:") and not Path(options.model).is_dir():
        raise ValueError(f"model: there is no folder {options.model!r}; valid: a checkpoint folder, models:/NAME@ALIAS")


def _run(options: Options, folder: Path, label: str, version: registry.ModelVersion | None) -> int:
    calibrations = Calibrations.beside(folder) if version is None else Calibrations.of_version(version)
    used = calibrations.current()
    if options.action == "list":
        for each in calibrations.listed():
            print(_line(each, used))
        if used is None:
            print(f"{label} has no operating points")
        return 0
    if options.action == "revert":
        print(f"{label} is decided by calibration {_name(calibrations.revert(options.id))} again")
        return 0
    pairs = read_pairs(options.pairs)
    embed = _by_service(options.url, label) if options.url else _here(folder)
    positives = sum(pairs.same)
    source = f"{Path(options.pairs).name}: {positives:,} positives, {len(pairs) - positives:,} negatives"
    found = measure(pairs, Path(options.pairs).parent, embed, used, options.far, source)
    _show(found, used)
    for remark in found.remarks:
        command_line.warn(remark)
    if found.calibration is None:
        raise ValueError(f"{options.pairs}: too few negatives for any of the targets; nothing is changed")
    if options.dry_run:
        print("--dry-run: nothing is changed")
        return 0
    calibrations.use(found.calibration)
    print(f"{label} is decided by calibration {found.calibration.id} now; services take it up within seconds")
    if used is not None and used.id != found.calibration.id:
        back = used.id if used.created else REGISTERED
        print(f"back: python -m serve.calibrate revert {back} --model {options.model}")
    return 0


def _here(folder: Path) -> Embed:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedder = CheckpointEmbedder(folder, "", "", Execution(device, batch=BATCH))

    def embed(paths: Sequence[Path]) -> npt.NDArray[np.float32]:
        chunks = []
        for start in range(0, len(paths), BATCH):
            inputs = []
            for path in paths[start : start + BATCH]:
                try:
                    inputs.append(embedder.decode(path.read_bytes()))
                except (OSError, ImageError) as error:
                    raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
            chunks.append(embedder.embed(inputs))
        return np.concatenate(chunks)

    return embed


def _by_service(url: str, label: str) -> Embed:
    def embed(paths: Sequence[Path]) -> npt.NDArray[np.float32]:
        with Client(url) as client:
            served = client.ready().model
            if served != label:
                raise ValueError(f"{url} serves {served}, not {label}; name its model with --model")
            for path in paths:
                if not os.access(path, os.R_OK):
                    raise ValueError(f"{path} is not there, or cannot be read")
            try:
                return client.embeddings(paths, model=label)
            except ServiceError as error:
                if found := re.fullmatch(r"input\[(\d+)\]", error.param or ""):
                    raise ValueError(error.message.replace(found[0], str(paths[int(found[1])]), 1)) from error
                raise

    return embed


def _show(found: Found, used: Calibration | None) -> None:
    import rich.box
    import rich.console
    import rich.table

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column in ("FAR target", "in use", "FAR", "FRR", "new", "FAR", "FRR"):
        table.add_column(column, justify="right")
    old = {rates.far_target: rates for rates in found.before}
    new = {point.far_target: point for point in (found.calibration.points if found.calibration else ())}
    for target in sorted({*old, *new}, reverse=True):
        table.add_row(f"{target:g}", *_cells(old.get(target)), *_cells(new.get(target)))
    title = f"in use is calibration {_name(used)}" if used else "the model has no operating points yet"
    console = rich.console.Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"Thresholds and what they do to these pairs, with 95% intervals over classes; {title}.")
    console.print(table)


def _cells(found: LabelledRates | OperatingPoint | None) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    return f"{found.threshold:.4f}", _rate(found.far, found.far_interval), _rate(found.frr, found.frr_interval)


def _rate(rate: float, interval: tuple[float, float] | None) -> str:
    return f"{rate:.3g}" if interval is None else f"{rate:.3g} ({interval[0]:.2g} to {interval[1]:.2g})"


def _line(each: Calibration, used: Calibration | None) -> str:
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.created)) if each.created else " " * 16
    points = ", ".join(f"{point.far_target:g}: {point.threshold:.4f}" for point in each.points)
    return f"{'*' if used and each.id == used.id else ' '} {each.id}  {made}  {each.source}  ({points})"


def _name(calibration: Calibration) -> str:
    return calibration.id if calibration.created else f"{calibration.id} ({REGISTERED})"


if __name__ == "__main__":
    raise SystemExit(main())
