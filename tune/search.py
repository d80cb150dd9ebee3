"""Searches TCM's margins with Ray Tune and Optuna: `python -m tune.search`.

Every trial trains one encoder; trial 0 is the baseline without TCM. The winner becomes `onethreshold@champion`.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import NoReturn

import ray.tune

from cluster import command_line, registry, session, shared_storage, tracking
from cluster.delivery import without_password
from cluster.tracking import Store, TrackingError, one_line
from cluster.writer import Writer
from dml import plots
from tune import (
    candidate,
    early_stopping,
    finals,
    page,
    promote,
    report,
    resources,
    resume,
    retrain,
    sampler,
    storage,
    tested,
)
from tune.objective import RULES, Outcome, baseline, front, winner
from tune.options import Options, check_options, own_options, run_params, shown_command
from tune.optuna_search import StudySearch
from tune.progress import Progress
from tune.space import Space
from tune.trial import Study, run, trial_key
from tune.trials import Bench


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    began = time.perf_counter()
    words = resume.words_of(sys.argv[1:] if argv is None else argv)
    resumed = command_line.value_of(words, "--resume")
    options = (
        resume.options_of(Options, words, resumed) if resumed else command_line.parse(Options, words, budget="short")
    )
    config = options.config.replace(**{"evaluate.score_weight": options.objective.weight, "tcm.weight": 0.0})
    with command_line.one_line_errors(status=2):
        check_options(options)
        space = Space.of(options.space, config, flat=options.sampler in sampler.FLAT)
        kept = session.kept_storage(options.storage)
        url = storage.url(options.optuna_storage, kept)
        trials = _trials(options, space)
        if options.go_on and resume.is_done(options, kept, trials):
            print(f"search {options.resume} has ended, with its {trials} trials: nothing is left to do")
            return 0
        folder = resume.place(options, kept, url, trials)
        name = folder.name
    splits = command_line.preflight(config, options.workers_per_trial)
    if options.retrain:
        with command_line.one_line_errors(status=2):
            retrain.changed(config, options.retrain)
    session.connect()
    with command_line.one_line_errors(), session.stopped_as_by_ctrl_c():
        taken = _claim(options)
        shared_storage.check(kept)
        shared_storage.check_runs(tracking.connect())
        key = resume.begun(folder, options, url).key
        store = Store.open(kept if options.storage else "")
        tags = {"kind": "search", "command": f"python -m tune.search {shown_command(words, options)}"}
        parent = store.start(name, params=run_params(options, config, space, url), tags=tags, key=key)
        command_line.print_config(config)
        print(f"search {name}: {trials} trials{_budget(words)}\n{space}\n")
        study = Study(name, key, config, taken, kept, store, parent.run_id)
        with parent.closing() as record:
            outcomes = _search(options, study, space, url)
            hopeless = _hopeless(outcomes, options.give_up_after)
            ended = hopeless or len(outcomes) >= trials  # else Ctrl-C came between two trials
            if not ended or any(outcome.state == "unfinished" for outcome in outcomes):
                _stop(outcomes, options, study)
            findings = _findings(options, outcomes, study, space, url, toy=splits.toy)
            if not findings.finished:
                _publish(findings, study, record)
            if hopeless:
                raise ValueError(hopeless)
            chosen = winner(outcomes, options.objective.tolerance, options.objective.mode)
            with one_line(store.uri):
                _finish(options, findings, chosen, study, record)
            folder.end({"trials": len(outcomes)})
    print(f"total {time.perf_counter() - began:.0f} s; {_overhead()}")
    print(f"browse it:  make ui      (mlflow ui --backend-store-uri {without_password(store.uri)})")
    print("serve it:   make serve   (python -m serve.app)")
    return 0


def _claim(options: Options) -> session.Resources:
    """What a trial takes."""
    try:
        return resources.claim(
            options.workers_per_trial,
            options.cpus_per_worker,
            options.gpus_per_worker,
            wait=options.wait_for_resources,
        )
    except TimeoutError as error:
        raise ValueError(str(error)) from None


def _search(options: Options, study: Study, space: Space, url: str) -> list[Outcome]:
    """Runs the trials, or those of them that have not ended."""
    trials = _trials(options, space)
    points = space.first_points()
    if options.sampler == "grid":
        points += space.grid(options.grid_points, seed=options.seed)
    before = storage.trials(url, study.name)
    searcher = StudySearch(
        space,
        options.objective,
        # One that goes on would draw its first points again.
        sampler=sampler.build(
            options.sampler, seed=options.seed + before, trials=options.trials, search_off=bool(space.others)
        ),
        points=points,
        trials=trials,
        design=options.sampler != "grid",
        study=study.name,
        url=url,
        hopeless=options.give_up_after,
    )
    if options.resume:
        print(f"{study.name} goes on: {trials - searcher.left} of {trials} trials are done\n", flush=True)
    scheduler = early_stopping.build(options.early_stop, study.config.train)
    return _bench(options, study, trials, done=trials - searcher.left).search(searcher, scheduler)


def _trials(options: Options, space: Space) -> int:
    """Trials to run: of a grid not more than it has points."""
    if options.sampler != "grid":
        return options.trials
    return min(options.trials, len(space.first_points()) + space.grid_size(options.grid_points))


def _bench(options: Options, study: Study, trials: int, *, done: int = 0) -> Bench:
    taken = study.resources
    # More than one worker is a Ray Train job, which asks for its own CPUs: a driver that held a share of one could
    # starve its workers, and Tune refuses an empty request, so the driver asks for a byte.
    request = taken.per_worker if taken.workers == 1 else {"memory": 1.0}
    return Bench(
        storage=study.folder,
        trainable=ray.tune.with_parameters(run, study=study),
        request=request,
        at_once=options.trials_at_once or resources.trials_at_once(taken),
        reuse=taken.workers == 1,
        callbacks=[Progress(trials, study.config.train.epochs, done), resources.Waiting(taken), resources.Freeing()],
    )


def _hopeless(outcomes: Sequence[Outcome], give_up_after: int) -> str:
    """Why nothing but failures is to be expected; empty where more is."""
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if not 0 < give_up_after <= len(failed) == len(outcomes):
        return ""
    return (
        f"the first {len(failed)} trials have all failed, and the search is given up (--give-up-after "
        f"{give_up_after}); the first failure: {failed[0].error}"
    )


def _finals(options: Options, outcomes: Sequence[Outcome], study: Study) -> finals.Finals:
    """Trains the finalists over new seeds."""
    objective = options.objective
    chosen = finals.finalists(outcomes, options.finalists, objective.tolerance, objective.mode)
    first = study.config.train.seed + 1  # the search's own seed chose them, and would flatter them
    points = finals.points(chosen, range(first, first + options.seeds))
    print(f"\n{len(chosen)} finalists over {options.seeds} new seeds: {len(points)} trainings\n")
    ran = _bench(options, study, len(points)).run(points)
    if len(ran) < len(points) or any(outcome.state == "unfinished" for outcome in ran):
        _stop(outcomes, options, study)
    _tell(study, ran)
    return finals.judge(ran, objective.tolerance, objective.mode)


def _tell(study: Study, outcomes: Sequence[Outcome]) -> None:
    """Tells the runs of trials how they ended."""
    # A trial that was stopped early had no time to end its run.
    study.store.end_children(study.parent)
    states = {trial_key(study.key, o.number, o.settings.get("train.seed")): {"state": o.state} for o in outcomes}
    study.store.tag_children(study.parent, states)


def _findings(
    options: Options, outcomes: list[Outcome], study: Study, space: Space, url: str, *, toy: bool
) -> page.Findings:
    """What the trials came to."""
    _tell(study, outcomes)
    return page.Findings(
        name=study.name,
        outcomes=outcomes,
        objective=options.objective,
        space=space,
        config=study.config,
        importances=page.importances(study.name, url),
        options=own_options(options, url),
        facts={"MLflow run": study.parent},
        command=study.store.tag(study.parent, "command"),  # also of a search that was resumed
        toy=toy,
    )


def _finish(options: Options, findings: page.Findings, chosen: Outcome, study: Study, record: Writer) -> None:
    """Table, finals, test classes, figures, page, registry."""
    outcomes, over_seeds = findings.outcomes, None
    report.print_trials(outcomes, chosen)
    if options.objective.mode == "pareto":
        report.print_front(front(outcomes))
    winning_run, reference = chosen, baseline(outcomes)
    if options.seeds:
        over_seeds = _finals(options, outcomes, study)
        report.print_finals(over_seeds)
        record.summary(report.finals_summary(over_seeds))
        chosen = next(outcome for outcome in outcomes if outcome.number == over_seeds.winner.number)
        winning_run, reference = over_seeds.model()
    print(f"winner: trial {chosen.number}, {RULES[options.objective.mode]} within the tolerance")
    record.json(candidate.rows([*outcomes, winning_run, *([reference] if reference else [])]), candidate.MODELS)
    if options.retrain:
        place = retrain.Place(study.name, study.resources, study.storage, study.store, study.parent)
        winning_run, reference = retrain.both(winning_run, reference, study.config, options.retrain, place)
    models = [winning_run] if reference is None or reference is winning_run else [winning_run, reference]
    found = tested.test([model.checkpoint for model in models], study.resources)
    winning, before = found[0], None if reference is None else found[-1]
    report.print_test(before, winning, toy=findings.toy)
    promote.print_thresholds(winning)
    if chosen.number == 0:
        print("No margins beat the baseline within the tolerance: the winner is the encoder without TCM.")
    record.summary({**report.summary(before, winning), **report.study_summary(outcomes, reference, winning_run)})
    record.tags({"winner": str(chosen.number)})
    if before is not None and before.curves is not None and winning.curves is not None:
        figure = plots.compare_utility(before.curves, winning.curves, c=study.config.evaluate.utility_c)
        record.figure(figure, "figures/utility.png")
    rows = [
        {"number": o.number, "recall": o.recall, "opis": o.opis, "state": _state(o, chosen)}
        for o in outcomes
        if o.state == "finished"
    ]
    record.figure(plots.search_scatter(rows), "figures/search.png")
    findings = replace(findings, chosen=chosen, finals=over_seeds, tested=winning, tested_baseline=before)
    _publish(findings, study, record)
    version = promote.register(
        winning_run.checkpoint, winning, before, run_id=winning_run.run_id, name=options.model_name
    )
    record.tags({"registered": f"{version.name}/{version.version}"})
    done = promote.promote(version, options.objective, study.resources, options.promote)
    alias = f", alias {registry.ALIAS}" if done.moved else ""
    print(f"registered {version.name} version {version.version}{alias} (trial {chosen.number})")
    promote.print_promotion(done)
    record.tags({"promotion": done.why, **({"champion": f"{version.name}/{version.version}"} if done.moved else {})})


def _publish(findings: page.Findings, study: Study, record: Writer) -> None:
    print(f"its page: {page.publish(findings, record, study.parent, f'{study.storage}/{study.name}')}")


def _state(outcome: Outcome, chosen: Outcome) -> str:
    return "winner" if outcome is chosen else "baseline" if outcome.number == 0 else "other"


def _stop(outcomes: Sequence[Outcome], options: Options, study: Study) -> NoReturn:
    """Says how to go on after Ctrl-C, and leaves no run behind that looks alive."""
    done = sum(outcome.state != "unfinished" for outcome in outcomes)
    where = f" --storage {options.storage}" if options.storage else ""
    print(f"\ninterrupted: {done} of {options.trials} trials are done and kept. Go on with:")
    print(f"  python -m tune.search --resume {study.name}{where}", flush=True)
    with suppress(TrackingError):  # whoever goes on ends them
        study.store.end_children(study.parent)
    raise SystemExit(130)


def _overhead() -> str:
    seconds = Progress.latest.overhead if Progress.latest is not None else None
    if seconds is None or not seconds.later:
        return "trial overhead: every trial was the first of its process"
    first = f"; the first of a process {median(seconds.first):.2f} s" if seconds.first else ""
    return f"trial overhead: {median(seconds.later):.2f} s (median of {len(seconds.later)} outside the loop{first})"


def _budget(words: list[str]) -> str:
    full = any(word == "full" and before == "--budget" for before, word in pairwise(words))
    return "" if full or "--budget=full" in words else " (short budget: a first look; --budget full trains to the end)"


if __name__ == "__main__":
    raise SystemExit(main())
