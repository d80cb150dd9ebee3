"""From a model to the champion: test classes once, the registry, and the alias if it beats the present champion.

`python -m tune.promote RUN_OR_CHECKPOINT` does it for any run, `python -m tune.promote --rollback` undoes the last.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import ray.train
import tyro

from cluster import command_line, registry, session, shared_storage
from cluster.tracking import Store, one_line, unsent_warning
from dml import checkpoint
from dml.losses import LOSSES
from tune import candidate, report, retrain, tested
from tune.candidate import Candidate
from tune.challenge import Contender, IncomparableError, Result, challenge
from tune.model_card import model_card
from tune.objective import Mode, Objective
from tune.tested import Tested

When: TypeAlias = Literal["better", "always", "never"]


@dataclass(frozen=True)
class Promotion:
    """Whether a version became champion.

    Attributes:
        version: of the registered model.
        moved: the alias points to it now, and did not before.
        why: one sentence without its full stop.
        result: the comparison with the champion, where there was one.
    """

    version: registry.ModelVersion
    moved: bool
    why: str
    result: Result | None = None


def register(
    path: str, found: Tested, baseline: Tested | None = None, *, run_id: str, name: str = registry.NAME
) -> registry.ModelVersion:
    """Registers a checkpoint as a new version of a model, with its card; no alias moves.

    Args:
        path: path or URI of the checkpoint folder.
        found: its test figures, operating points and their transfer.
        baseline: the model without TCM that it was tested beside.
        run_id: MLflow run that the model belongs to.
        name: registered model.

    Raises:
        ValueError: the data are no longer those that it was trained on, so that test classes may have trained it.
        CheckpointError: the folder is no usable checkpoint.
        MlflowException: the run is unknown, or the tracking server fails.
    """
    with ray.train.Checkpoint(path).as_directory() as directory:
        folder = Path(directory)
        model = checkpoint.load(folder)
        trained_on = str(model.info.get("fingerprint") or found.fingerprint)
        if trained_on != found.fingerprint:
            raise ValueError(
                f"the data have changed since {path} was trained (fingerprint {found.fingerprint[:12]}, then "
                f"{trained_on[:12]}): what is test now may have trained it"
            )
        evaluation = {
            "metrics": found.metrics,
            "baseline": None if baseline is None else baseline.metrics,
            "transfer": found.transfers,
            "distances": found.distances,
            "worst_classes": [{"name": label, "mean_utility": utility} for label, utility in found.worst],
            "splits": {split: {"classes": c, "images": n} for split, (c, n) in (found.sizes or {}).items()},
            "fingerprint": found.fingerprint,
        }
        return registry.register(
            folder,
            run_id=run_id,
            operating_points=found.operating_points,
            metrics=found.metrics,
            name=name,
            tags={"data.dataset": model.config.data.dataset, "data.fingerprint": found.fingerprint},
            card=model_card(name, model, found, baseline),
            evaluation=evaluation,
        )


def promote(
    version: registry.ModelVersion, objective: Objective, resources: session.Resources, when: When = "better"
) -> Promotion:
    """Moves the alias champion to a version: if it beats the present champion, always, or never.

    Args:
        version: registered.
        objective: by which the two are compared, on val classes that neither was trained on.
        resources: what one worker may take.
        when: better, always or never.

    Raises:
        CheckpointError: the version, or the champion, is no usable checkpoint.
        MlflowException: the tracking server cannot be reached, or refuses.
    """
    present = registry.champion(version.name)
    decided = _decide(version, present, objective, resources, when)
    if decided.moved:
        registry.promote(version)
    if present != version:
        registry.tag(version, {"promotion": f"{'champion' if decided.moved else 'not champion'}: {decided.why}"})
    return decided


def _decide(
    version: registry.ModelVersion,
    present: registry.ModelVersion | None,
    objective: Objective,
    resources: session.Resources,
    when: When,
) -> Promotion:
    if present == version:
        return Promotion(version, False, "it is the champion already")
    if when == "never":
        return Promotion(version, False, "--promote never")
    if present is None:
        return Promotion(version, True, "there was no champion")
    if when == "always":
        return Promotion(version, True, "--promote always")
    try:
        ours, theirs = (Contender.of(v.label, checkpoint.load(registry.download(v))) for v in (version, present))
        result = challenge(ours, theirs, objective, resources)
    except IncomparableError as error:
        why = f"it cannot be compared with {present.label}: {error}. --promote always moves the alias all the same"
        return Promotion(version, False, why)
    verb = "beats" if result.won else "does not beat"
    return Promotion(version, result.won, f"it {verb} {present.label}: {result}", result)


def print_thresholds(found: Tested) -> None:
    """What the thresholds that val classes gave do to test classes."""
    for point, held in zip(found.operating_points, found.transfers, strict=True):
        ends = held["far_interval"]
        interval = "" if ends is None else f" ({ends[0]:.2g} to {ends[1]:.2g})"
        print(
            f"threshold {point['threshold']:.4f}, set on val for FAR {point['far_target']:g}, has on test "
            f"FAR {held['far']:.3g}{interval} and FRR {held['frr']:.3g}"
        )


def print_promotion(done: Promotion) -> None:
    """Says what the alias points to now, and why."""
    name = done.version.name
    if done.moved:
        print(f"{name}@{registry.ALIAS} is version {done.version.version} now: {done.why}")
        return
    present = registry.champion(name)
    stays = "there is no champion" if present is None else f"{name}@{registry.ALIAS} stays version {present.version}"
    print(f"{stays}: {done.why}")


@dataclass(frozen=True)
class Options:
    """Tests a trained model, registers it in MLflow, and makes it the champion if it beats the present one.

    The model: an MLflow run id, a checkpoint folder or that of a run, models:/NAME/VERSION or models:/NAME@ALIAS (which
    is registered and tested already). It beats the champion by Recall@1 - w * sqrt(OPIS), or by what --mode says, on
    val classes of the same split that neither was trained on.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")] = ""
    promote: When = "better"
    """Moves the alias champion if the model beats the present champion, always or never."""
    rollback: bool = False
    """Instead: the alias goes back to the champion before; again, to the one before that."""
    mode: Mode = "combined"
    """How two models are compared: by the score, by OPIS (constrained) or by the knee of both (pareto). w is that of
    the model's own training."""
    tolerance: float = 0.005
    """How far the model's Recall@1 may lie below the champion's."""
    baseline: str = ""
    """The model without TCM to test it beside, named as the model is; of a trial, that of its search."""
    retrain: float = 0.0
    """First trains its settings again, with and without TCM, on train and this share of the val classes; the others
    set the thresholds. 0 takes the model as it is."""
    model_name: str = registry.NAME
    """Registered model that it becomes a version of."""
    workers: str = "1"
    """With --retrain, ranks that train together."""
    cpus_per_worker: float | None = None
    """CPUs of each rank; unless given, its GPU's share of the node's, or 1 without GPUs."""
    gpus_per_worker: float | None = None
    """GPUs of each rank; 1 when the cluster has GPUs, else 0."""
    storage: str = ""
    """With --retrain, where checkpoints go: a path that every node sees, or a URI. Default: runs/ray."""

    @property
    def place(self) -> str:
        """Storage, as an absolute path or a URI.

        Raises:
            ValueError: in a Ray job, what would be written there, or to MLflow, would be lost.
        """
        return session.kept_storage(self.storage, writes=bool(self.retrain))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = command_line.read(Options, sys.argv[1:] if argv is None else argv)
    with command_line.one_line_errors(status=2):
        _check(options)
        place = options.place
    with command_line.one_line_errors():
        store = Store.open(place if options.storage else "")
        with one_line(store.uri):
            if options.rollback:
                left, now = registry.rollback(options.model_name)
                print(f"{now.name}@{registry.ALIAS} is version {now.version} again; it was version {left.version}")
                return 0
            found = candidate.find(options.model, store)
            baseline = candidate.find(options.baseline, store).checkpoint if options.baseline else found.baseline
            _promote(options, found, baseline, store)
    return 0


def _check(options: Options) -> None:
    if options.rollback and options.model:
        raise ValueError(f"--rollback takes no model; {options.model} becomes champion with --promote always")
    if not options.rollback and not options.model:
        raise ValueError(f"name the model: {candidate.FORMS}; or --rollback")
    registry.check_name(options.model_name)
    if not 0 <= options.tolerance <= 1:
        raise ValueError(f"tolerance: {options.tolerance:g} is no difference in Recall@1; valid: 0 to 1")
    if not 0 <= options.retrain < 1:
        raise ValueError(f"retrain: {options.retrain:g} is no share of the val classes; valid: 0 to below 1")
    if options.baseline and options.retrain:
        raise ValueError("--baseline does not go with --retrain, which trains one of its own")


def _promote(options: Options, found: Candidate, baseline: str, store: Store) -> None:
    with ray.train.Checkpoint(found.checkpoint).as_directory() as folder:
        model = checkpoint.load(folder)
    objective = Objective(mode=options.mode, weight=model.config.evaluate.score_weight, tolerance=options.tolerance)
    if options.retrain:
        _check_retrain(model, options.retrain)
    session.connect()
    if options.retrain:
        shared_storage.check(options.place)
    resources = session.Resources.of(options.workers, options.cpus_per_worker, options.gpus_per_worker)
    version = found.version
    if version is None or options.retrain:
        version = _register(options, found, model, baseline, store, resources)
    done = promote(version, objective, resources, options.promote)
    print_promotion(done)


def _register(
    options: Options,
    found: Candidate,
    model: checkpoint.Checkpoint,
    baseline: str,
    store: Store,
    resources: session.Resources,
) -> registry.ModelVersion:
    """Tests the model beside its baseline, in an MLflow run of its own, and registers it."""
    name = command_line.stamped(f"promote-{model.config.data.dataset}")
    run = store.start(name, params=model.config.flat, tags={"kind": "promote", "of": found.label}, key=name)
    path, run_id = found.checkpoint, found.run_id or run.run_id
    with run.closing() as record:
        if options.retrain:
            place = retrain.Place(name, resources, options.place, store, run.run_id)
            path, run_id, baseline = _retrain(model, options.retrain, place)
        sides = tested.test([path, baseline] if baseline else [path], resources)
        before = sides[1] if baseline else None
        record.summary(report.summary(before, sides[0]))
        version = register(path, sides[0], before, run_id=run_id, name=options.model_name)
        record.tags({"registered": f"{version.name}/{version.version}"})
        print((registry.download(version) / registry.MODEL_CARD).read_text())
        print(f"registered {version.name} version {version.version}")
    if warning := unsent_warning(run.unsent):
        command_line.warn(warning)
    return version


def _check_retrain(model: checkpoint.Checkpoint, share: float) -> None:
    if model.config.loss.name not in LOSSES:
        raise ValueError(
            f"retrain: its loss {model.config.loss.name} comes from outside, and what a checkpoint names is not "
            "imported; train it again with python -m cluster.train --data.train-on-val, then promote that run"
        )
    retrain.changed(model.config, share)


def _retrain(model: checkpoint.Checkpoint, share: float, place: retrain.Place) -> tuple[str, str, str]:
    """Checkpoint and run of the retrained model, and the checkpoint of its baseline; empty where it has no TCM."""
    config, source = retrain.changed(model.config, share), str(model.info.get("init") or "")
    init = checkpoint.warm_start(checkpoint.load(registry.fetch(source)[0]), config) if source else None
    winner = retrain.run(config, "winner", place, init=init, init_from=source)
    if not config.tcm.weight:
        return winner.checkpoint, winner.run_id, ""
    without = config.replace(**{"tcm.weight": 0.0})
    baseline = retrain.run(without, "baseline", place, init=init, init_from=source)
    return winner.checkpoint, winner.run_id, baseline.checkpoint


if __name__ == "__main__":
    raise SystemExit(main())
