"""Command lines: a recipe, its settings by name, and errors in one line."""

import datetime
import inspect
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from itertools import takewhile
from typing import Any, TypeVar, cast, get_args

import pydantic
import rich.console
import rich.table
import tyro

from cluster import session
from cluster.delivery import reason
from cluster.failures import TrainingError
from cluster.outbox import OutboxInUse
from cluster.tracking import TrackingError
from dml import encoders, loop, losses, recipes
from dml.config import Config
from dml.data import datasets
from dml.names import unknown
from dml.state import differences

Options = TypeVar("Options")


def parse(
    options: type[Options], argv: Sequence[str], *, budget: recipes.Budget = "full", default: Options | None = None
) -> Options:
    """Reads --recipe and --budget, then every other option with the recipe's settings as defaults.

    Args:
        options: a dataclass with a field `config: Config`, whose fields become --section.field, and options of its own.
        argv: the words after the program's name.
        budget: when --budget is not given.
        default: what is not given, in place of a recipe's.

    Raises:
        SystemExit: 2, after one line on stderr, for an unknown recipe, option, setting, dataset, loss or encoder, or
            a value that is refused; 0 after --help.
    """
    rest = list(argv)
    with one_line_errors(status=2):
        start: Any = default or options(config=_recipe(rest, budget))  # type: ignore[call-arg]
        own = [name.replace("_", "-") for name in _own_names(start)]
        settings = [name for name in start.config.flat if not name.startswith("loss.options.")]
        valid = ["--recipe", "--budget", "--help", *(f"--{name}" for name in [*own, *settings, "loss.options"])]
        _refuse_unknown(rest, valid)
        if "--help" in rest or "-h" in rest:
            _print_recipes()
        parsed = _read(options, rest, start)
        config = _absolute(parsed.config)  # type: ignore[attr-defined]
        _check_names(config, anew=default is None)
    return replace(parsed, config=config)  # type: ignore[type-var]


def read(options: type[Options], argv: Sequence[str]) -> Options:
    """Reads the options of a program that has no recipe.

    Args:
        options: a dataclass whose fields all have defaults.
        argv: the words after the program's name.

    Raises:
        SystemExit: 2, after one line on stderr, for an unknown option or a value that is refused; 0 after --help.
    """
    with one_line_errors(status=2):
        default = options()
        names = [f"--{name.replace('_', '-')}" for name in _own_names(default)]
        _refuse_unknown(argv, [*names, "--help"])
        return _read(options, list(argv), default)


def goes_on(before: Options, argv: Sequence[str], what: str, *, stay: Sequence[str] = ()) -> Options:
    """The options of what --resume takes up: those that it began with, and what is given beside it.

    Args:
        before: the options that it began with.
        argv: the words after the program's name.
        what: goes on, "run" or "search".
        stay: fields of the options that may not change, beside the config.

    Raises:
        ValueError: something is given that would make it another.
        SystemExit: as in `parse`.
    """
    for option in ("--recipe", "--budget", "--name", "--init"):
        if value_of(argv, option):
            raise ValueError(f"{option} does not go with --resume: the {what} goes on with what it began with")
    options = parse(type(before), argv, default=before)
    changed = differences(before.config, options.config)  # type: ignore[attr-defined]
    for name in stay:
        was, now = getattr(before, name), getattr(options, name)
        changed += [f"{name} is {now}, was {was}"] if now != was else []
    if changed:
        raise ValueError(f"resume: a {what} goes on with the settings that it began with, but {'; '.join(changed)}")
    return options


def value_of(argv: Sequence[str], option: str) -> str:
    """The value of one option, read before the others; empty when it is not given.

    Raises:
        SystemExit: 2, after one line on stderr, when it has no value.
    """
    with one_line_errors(status=2):
        value = _take(list(argv), option, "")
        if not value and any(word.split("=")[0] == option for word in argv):
            raise ValueError(f"{option} needs a value")
    return value


def without(argv: Sequence[str], option: str) -> list[str]:
    """The words without one option and its value."""
    words = list(argv)
    _take(words, option, "")
    return words


def preflight(config: Config, workers: int | str = 1) -> datasets.Splits:
    """Loads the data and refuses what cannot be trained on, before any Ray is started.

    Args:
        config: everything about the run.
        workers: how many train together, or "MIN:MAX" of an elastic job.

    Raises:
        SystemExit: 2, after one line on stderr.
    """
    with one_line_errors(status=2):
        ranks = max(session.span(workers))
        splits = datasets.load(config.data)
        loop.check(splits, config, ranks)
    return splits


@contextmanager
def one_line_errors(status: int = 1) -> Iterator[None]:
    """Ends the program with one line on stderr where an error says all that a person needs."""
    try:
        yield
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        path = [error.title.removesuffix("Config").lower(), *map(str, first["loc"])]
        field = ".".join(part for part in path if part)
        shown = f" (got {first['input']!r})" if first["loc"] else ""
        _stop(f"{field}{': ' if field else ''}{first['msg'].removeprefix('Value error, ')}{shown}", status)
    except OSError as error:
        why = error.strerror or str(error)
        _stop(f"{error.filename}: {why}" if error.filename else why, status)
    except (ValueError, KeyError, TrainingError, TrackingError, OutboxInUse) as error:
        # The text of a KeyError is in quotes.
        _stop(str(error.args[0] if isinstance(error, KeyError) and error.args else error), status)
    except Exception as error:
        if type(error).__module__ != "mlflow.exceptions":
            raise
        _stop(f"MLflow: {reason(error)}", status)


def warn(text: str) -> None:
    """A warning, on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def print_config(config: Config) -> None:
    """The resolved settings, a line a section."""
    for section, fields in config.model_dump().items():
        shown = "  ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        print(f"{section:9} {shown}")


def run_name(given: str, kind: str) -> str:
    """The name that was given, or one of kind and time of day.

    Raises:
        ValueError: a name that is no plain folder name.
    """
    if given and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", given):
        raise ValueError(f"name: {given!r} is not made of letters, digits, '.', '_' and '-' alone")
    return given or stamped(kind)


def stamped(name: str) -> str:
    """A name with the time of day, e.g. glyphs-20261122-143005."""
    return f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _read(options: type[Options], words: list[str], default: Any) -> Options:
    """tyro.cli, with its page about a wrong value made one line."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            read: Any = tyro.cli(
                options, prog=_program(), args=words, default=default, description=inspect.getdoc(options)
            )
            return cast(Options, read)
    except SystemExit as stop:
        if not stop.code:
            raise
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, pydantic.ValidationError):
                raise cause from None
            cause = cause.__context__
        lines = [line.strip(" │╭╮╰╯─") for line in said.getvalue().splitlines()]
        raise ValueError(" ".join(takewhile(bool, lines[1:])) or "this command line cannot be read") from None


def _refuse_unknown(words: Sequence[str], valid: Sequence[str]) -> None:
    known = {option.replace("_", "-") for option in valid}
    for word in words:
        name = word.split("=")[0]
        # A switch can be turned off too: --no-figures, --encoder.no-pretrained.
        positive = name.replace("_", "-").replace("--no-", "--").replace(".no-", ".")
        if name.startswith("--") and positive not in known:
            raise ValueError(unknown("option", name, valid))


def _own_names(options: Any) -> Iterator[str]:
    """The options of a program beside its config, those of a group by their dotted names."""
    for name, value in vars(options).items():
        if isinstance(value, pydantic.BaseModel):
            yield from (f"{name}.{field}" for field in type(value).model_fields if name != "config")
        else:
            yield name


def _program() -> str | None:
    """How a person started this, for the help page; None lets tyro say it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec is not None else None


def _absolute(config: Config) -> Config:
    """Paths as the workers, who run in other folders, find them."""
    fields = ("data.root", "data.split_csv", "encoder.weights")
    given = {name: str(config.flat[name]) for name in fields if config.flat[name] is not None}
    return config.replace(**{name: session.local_path(path) for name, path in given.items()})


def _check_names(config: Config, *, anew: bool) -> None:
    if config.data.dataset not in datasets.DATASETS:
        raise ValueError(unknown("dataset", config.data.dataset, datasets.DATASETS))
    loss = losses.from_config(config.loss, num_classes=2, dim=2)
    if config.memory.size and not loss.takes_memory:
        raise ValueError(f"memory.size is {config.memory.size}, but loss {config.loss.name} takes none; set 0")
    # What goes on has weights of its own: those that it began with may be gone.
    encoders.check(config.encoder if anew else config.encoder.bare)


def _recipe(words: list[str], budget: recipes.Budget) -> Config:
    """The settings that --recipe and --budget name, which are taken out of the words."""
    recipe = _take(words, "--recipe", "glyphs")
    length = _take(words, "--budget", budget)
    if length not in get_args(recipes.Budget):
        raise ValueError(unknown("budget", length, get_args(recipes.Budget)))
    return recipes.build(recipe, cast(recipes.Budget, length))


def _take(words: list[str], option: str, default: str) -> str:
    """Removes `option value` or `option=value` from the words and returns the value."""
    for index, word in enumerate(words):
        if word == option:
            if index + 1 == len(words):
                raise ValueError(f"{option} needs a value")
            del words[index]
            return words.pop(index)
        if word.startswith(option + "="):
            return words.pop(index).split("=", 1)[1]
    return default


def _print_recipes() -> None:
    table = rich.table.Table(title="--recipe (with --budget short or full)", title_justify="left", show_header=False)
    for name, recipe in recipes.RECIPES.items():
        table.add_row(name, recipe.__doc__)
    rich.console.Console().print(table)


def _stop(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)
