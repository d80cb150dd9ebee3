"""What a search keeps of its options, and how `--resume NAME` takes them up."""

import uuid
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from cluster import command_line, session
from cluster.run_folder import Record, RunFolder
from tune import storage
from tune.objective import Objective

if TYPE_CHECKING:
    from tune.options import Options

_MUST_STAY = ("objective", "space", "grid_points")
_OF_A_PROCESS = ("config", "resume", "go_on", "name", "storage")


def words_of(words: Sequence[str]) -> list[str]:
    """The words of a command line, of which --name NAME --go-on becomes --resume NAME if that search was begun.

    Args:
        words: of the command line.

    Raises:
        SystemExit: 2, after one line on stderr: --go-on without --name, or beside --resume.
    """
    meant = list(words)
    if "--go-on" not in meant:
        return meant
    with command_line.one_line_errors(status=2):
        name = command_line.value_of(meant, "--name")
        if not name or command_line.value_of(meant, "--resume"):
            raise ValueError("--go-on goes with --name, which says what to go on with, and without --resume")
        kept = session.kept_storage(command_line.value_of(meant, "--storage"))
        if not RunFolder(kept, command_line.run_name(name, ""), "search").begun:
            return meant
    for option in ("--name", "--recipe", "--budget"):  # what it began with is known, and --resume refuses them
        meant = command_line.without(meant, option)
    return [*meant, "--resume", name]


def is_done(options: "Options", kept: str, trials: int) -> bool:
    """Whether a search that is resumed has ended with as many trials as it is to have.

    Args:
        options: of the search.
        kept: `cluster.session.kept_storage`.
        trials: to run; of a grid not more than it has points.
    """
    ended = RunFolder(kept, options.resume, "search").ended() if options.resume else None
    return ended is not None and bool(ended["trials"] >= trials)


def place(options: "Options", kept: str, url: str, trials: int) -> RunFolder:
    """The folder of a new search, or of one that goes on.

    Args:
        options: of the search.
        kept: `cluster.session.kept_storage`.
        url: of `tune.storage.url`.
        trials: to run; of a grid not more than it has points.

    Raises:
        ValueError: the name is taken, in the folder or in the database, or no folder's name; the database cannot be
            opened; the study of the search is in another; or the search has ended.
    """
    if not options.resume:
        folder = RunFolder(kept, command_line.run_name(options.name, options.config.data.dataset), "search")
        folder.refuse_taken()
        if storage.trials(url, folder.name):
            raise ValueError(f"name: {storage.shown(url)} has a study {folder.name} already; give another --name")
        return folder
    folder = RunFolder(kept, options.resume, "search")
    before = folder.record().resources["optuna_storage"]
    if before != storage.shown(url):
        raise ValueError(
            f"resume: the study of {folder.name} is in {before}, not in {storage.shown(url)}; give --optuna-storage, "
            f"or {storage.VARIABLE} in the environment"
        )
    if is_done(options, kept, trials):
        ended = (folder.ended() or {})["trials"]
        more = "its grid has no more" if trials < options.trials else "--trials can make it more"
        raise ValueError(f"resume: {folder.name} has ended, with {ended} trials; {more}")
    return folder


def begun(folder: RunFolder, options: "Options", url: str) -> Record:
    """How a search was begun, which is written down if it begins now.

    Args:
        folder: of `place`.
        options: of the search.
        url: of `tune.storage.url`.
    """
    if options.resume:
        return folder.record()
    # Not its name alone, which a search on another storage may have too.
    record = Record(options.config, f"{folder.name}/{uuid.uuid4().hex}", resources=_recorded(options, url))
    folder.begin(record)
    return record


def _recorded(options: "Options", url: str) -> dict[str, Any]:
    """The options as --resume takes them up; a password is not kept."""
    kept = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in _OF_A_PROCESS}
    return {**kept, "objective": options.objective.model_dump(), "optuna_storage": storage.shown(url)}


def options_of(kind: type["Options"], words: Sequence[str], name: str) -> "Options":
    """The options of a search that goes on.

    Args:
        kind: tune.options.Options.
        words: of the command line.
        name: that --resume gives.

    Raises:
        SystemExit: 2, after one line on stderr: there is no such search, or what is given beside --resume would change
            what is searched.
    """
    with command_line.one_line_errors(status=2):
        kept = session.kept_storage(command_line.value_of(words, "--storage"))
        record = RunFolder(kept, name, "search").record()
        told = dict(record.resources)
        if storage.hides_password(told["optuna_storage"]):
            told["optuna_storage"] = ""
        told |= {"objective": Objective.model_validate(told["objective"]), "space": tuple(told["space"])}
        return command_line.goes_on(kind(record.config, **told), words, "search", stay=_MUST_STAY)
