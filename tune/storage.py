"""Where Optuna keeps a study: SQLite under runs/, or any database that SQLAlchemy reaches."""

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from cluster import session
from cluster.tracking import runs_dir

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

VARIABLE = "ONETHRESHOLD_OPTUNA_STORAGE"
"""The environment variable that names the database where no option does: what a password in a URL is safest in."""


def url(given: str, kept: str = "") -> str:
    """The URL of the database: the one given, else the environment's, else SQLite at runs/optuna.db.

    A PostgreSQL URL without a driver is given psycopg's.

    Args:
        given: by option; empty when it is not.
        kept: path or URI where the search keeps what it must not lose. In a job of `ray job submit`, whose folder is
            thrown away, SQLite's file lies there.

    Raises:
        ValueError: it is no URL of a database (the message does not repeat it, since it may hold a password), or a
            job has none and only a URI to keep things at.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    text = given or os.environ.get(VARIABLE, "")
    if not text and session.submitted():
        if "://" in kept:
            raise ValueError(
                f"optuna-storage: in a job runs/ is thrown away, and a database does not fit into {kept}; give "
                f"--optuna-storage URL, or {VARIABLE} in the job's environment"
            )
        Path(kept).mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{kept}/optuna.db"
    if not text:
        runs_dir().mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{runs_dir() / 'optuna.db'}"
    try:
        parsed = make_url(text)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        raise ValueError(
            "--optuna-storage is no URL of a database, such as sqlite:////shared/optuna.db or "
            "postgresql://user:password@host/database"
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed.render_as_string(hide_password=False)


def shown(text: str) -> str:
    """A URL of a database without its password, also one among its query's parameters."""
    from sqlalchemy.engine import make_url

    parsed = make_url(text)
    secret = [name for name in parsed.query if "pass" in name.lower() or "secret" in name.lower()]
    return parsed.update_query_dict(dict.fromkeys(secret, "***")).render_as_string(hide_password=True)


def hides_password(text: str) -> bool:
    """Whether a URL is one of `shown` that had a password, so that nothing can be reached by it."""
    return "***" in unquote(text)  # among a query's parameters it is quoted


def trials(text: str, study: str) -> int:
    """How many trials of a study were begun; 0 also where there is no such study.

    Args:
        text: of `url`.
        study: its name.
    """
    import optuna

    opened = connect(text)
    if study not in optuna.get_all_study_names(opened):
        return 0
    found = optuna.load_study(study_name=study, storage=opened).get_trials(deepcopy=False)
    return sum(trial.state != optuna.trial.TrialState.WAITING for trial in found)


def connect(text: str) -> "RDBStorage":
    """Opens a database, with Optuna's tables made where they are missing.

    Args:
        text: of `url`.

    Raises:
        ValueError: its driver is not installed, or it cannot be reached; the password is not in the message.
    """
    import optuna
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    # A server may close a connection that idles while trials train.
    engine = {} if text.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        return optuna.storages.RDBStorage(text, engine_kwargs=engine)
    except ImportError as error:
        # Optuna's own message advises packages for other drivers.
        cause = error.__cause__ or error.__context__ or error
        missing = getattr(cause, "name", None) or "its driver"
        hint = ": pip install 'psycopg[binary]'" if missing == "psycopg" else ""
        raise ValueError(f"--optuna-storage {shown(text)}: {missing} is not installed{hint}") from None
    except NoSuchModuleError:
        raise ValueError(f"--optuna-storage {shown(text)}: SQLAlchemy knows no such database or driver") from None
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise ValueError(f"--optuna-storage {shown(text)} cannot be opened: {reason}") from None
