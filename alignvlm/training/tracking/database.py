"""MLflow's SQLite file: made as a whole, and looked at before MLflow opens it, which would try for minutes."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from pathlib import Path

from alignvlm.errors import UserError

LOCK_SECONDS = 5.0
"""How long another process may hold the database."""


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite tracking URI; None for anything else."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path) if uri.startswith("sqlite:///") and path and path != ":memory:" else None


def prepare_database(uri: str) -> None:
    """Create the file with all of MLflow's tables when there is none; else make sure that it can be read and written.

    Raises:
        UserError: it is no database, it is damaged, or another process holds it; nothing for other tracking URIs.
    """
    path = sqlite_file(uri)
    if path is None:
        return
    if not path.exists():
        create_database(path)
    try:
        connection = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.Error as error:
        held = "locked" in str(error)
        way_out = "another process holds it" if held else "move it away, and `alignvlm track` fills a new one"
        raise UserError(f"{path}: {error}; {way_out}") from error


def create_database(path: Path) -> None:
    """Make the tables beside and give them their name at once: whoever is killed meanwhile leaves no half of them.

    Of several processes that do this at the same time the first one's file stays.
    """
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        MlflowClient(f"sqlite:///{new.resolve()}").search_experiments(max_results=1)
        try:
            os.link(new, path)  # unlike a renaming, it never replaces a file
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            new.rename(path)
