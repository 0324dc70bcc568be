"""MLflow's database in a file: made aside and moved into place whole, mended where a killed command left half of it."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bundle.errors import BundleError
from bundle.files import ARTIFACTS, partial_prefix

PREFIX = "sqlite:///"
BESIDE = ("-journal", "-wal", "-shm")  # of SQLite; beside a database that they do not belong to, they would spoil it
# where MLflow notes places of files: table and column
PLACES = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)

logger = logging.getLogger(__name__)


def database_file(uri: str) -> Path | None:
    """The file of the SQLite database ``uri``; None for a server."""
    return Path(uri.removeprefix(PREFIX)) if uri.startswith(PREFIX) else None


def artifact_location(file: Path) -> str:
    """Where experiments of the database ``file`` keep files: the URI of a folder beside it."""
    return (file.parent.resolve() / ARTIFACTS).as_uri()


def ready_database(file: Path, experiment: str) -> None:
    """Make sure that a whole database of this MLflow is at ``file``, and that ``experiment`` keeps its files beside it.

    A new database is made aside, and so is one that was made by halves, or by an earlier MLflow: a command that is
    killed meanwhile, or a full disk, leaves what was there before. What cannot be read at all is moved aside.

    Args:
        file: of the database; its folder is made.
        experiment: by name; whoever copies or moves the folder takes the files of its runs along.

    Raises:
        BundleError: if the database holds runs, and MLflow cannot bring it to its present form.
        sqlite3.OperationalError: if it cannot be read at present, as others have locked it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        _make(file)
    else:
        try:
            version, content = _version(file), _has_content(file)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            logger.warning(
                f"'{file}' is no database ({error}): it is now '{_move_aside(file).name}', and a new one is made"
            )
            _make(file)
        else:
            if version != _newest_version():
                if not content:
                    logger.warning(f"'{file}' was made by halves by a command that was killed: it is made anew")
                _make(file, content)
    _keep_files_beside(file, experiment)


def _make(file: Path, content: bool = False) -> None:
    """Put a whole database in the place of ``file``, with what that holds if it has ``content``."""
    with tempfile.TemporaryDirectory(prefix=partial_prefix(), dir=file.parent) as workspace:
        fresh = Path(workspace, file.name)
        if content:
            with _opened(file) as old, closing(sqlite3.connect(fresh)) as new:
                old.backup(new)
        try:
            _bring_to_newest(fresh, file.parent / ARTIFACTS)
        except Exception as error:
            if not content:
                raise
            raise BundleError(
                f"MLflow cannot bring '{file}' to its version ({type(error).__name__}): move it to another folder"
            ) from error
        for suffix in BESIDE:
            Path(f"{file}{suffix}").unlink(missing_ok=True)
        if file.exists():
            os.replace(fresh, file)
        else:
            _place(fresh, file)


def _place(fresh: Path, file: Path) -> None:
    """Move ``fresh`` to ``file``, unless another process was faster: its database may hold runs by now."""
    try:
        os.link(fresh, file)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        os.replace(fresh, file)


def _bring_to_newest(file: Path, artifacts: Path) -> None:
    """Let MLflow make ``file``, or change it to its newest form."""
    from mlflow.store.db import utils
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # slow to import

    if file.exists():
        engine = utils.create_sqlalchemy_engine_with_retry(f"{PREFIX}{file}")
        utils._upgrade_db(engine)
        engine.dispose()
    SqlAlchemyStore(f"{PREFIX}{file}", str(artifacts))._dispose_engine()


def _newest_version() -> str:
    from mlflow.store.db import utils

    return str(utils._get_latest_schema_revision())


@contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    """A connection whose changes are kept if the block ends well."""
    with closing(sqlite3.connect(file)) as connection, connection:
        yield connection


def _version(file: Path) -> str | None:
    """The version of the tables, which MLflow writes after all of them; None if there is none."""
    with _opened(file) as connection:
        if not _has_table(connection, "alembic_version"):
            return None
        row = connection.execute("select version_num from alembic_version").fetchone()
        return None if row is None else str(row[0])


def _has_content(file: Path) -> bool:
    """Whether the database holds more than MLflow puts into every new one."""
    with _opened(file) as connection:
        runs, experiments = (
            connection.execute(f"select count(*) from {table}").fetchone()[0] if _has_table(connection, table) else 0
            for table in ("runs", "experiments")
        )
    return bool(runs > 0 or experiments > 1)


def _has_table(connection: sqlite3.Connection, name: str) -> bool:
    found = connection.execute("select 1 from sqlite_master where type = 'table' and name = ?", (name,)).fetchone()
    return found is not None


def _move_aside(file: Path) -> Path:
    """Give a file that cannot be read a name that is free; what SQLite keeps beside it goes along."""
    number = 1
    while (target := file.with_name(f"{file.name}.damaged-{number}")).exists():
        number += 1
    for suffix in (*BESIDE, ""):
        if Path(f"{file}{suffix}").exists():
            shutil.move(f"{file}{suffix}", f"{target}{suffix}")
    return target


def _keep_files_beside(file: Path, experiment: str) -> None:
    """Correct where the files of a folder lie that was copied or moved: MLflow notes whole paths.

    Runs and models whose files did not come along keep their note.
    """
    here = artifact_location(file)
    with _opened(file) as connection:
        row = connection.execute(
            "select experiment_id, artifact_location from experiments where name = ?", (experiment,)
        ).fetchone()
        number, there = row or (None, None)
        if not there or there == here or not (there.startswith("file:") and there.endswith(f"/{ARTIFACTS}")):
            return
        connection.execute("update experiments set artifact_location = ? where experiment_id = ?", (here, number))
        for table, column in PLACES:
            for row, uri in connection.execute(f"select rowid, {column} from {table}").fetchall():
                place = f"{here}{(uri or '').removeprefix(there)}"
                if uri and uri.startswith(f"{there}/") and Path(unquote(urlsplit(place).path)).exists():
                    connection.execute(f"update {table} set {column} = ? where rowid = ?", (place, row))
    logger.info(
        f"'{file.parent}' is a copy, or was moved: MLflow keeps the files of its runs in '{ARTIFACTS}' there now"
    )
