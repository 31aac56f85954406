"""The address of the tracking store: what it means, and whether anything answers there before a sweep starts."""

import logging
import os
import re
import threading
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SQLITE = re.compile(r"sqlite(\+\w+)?:///")
_DATABASES = ("postgresql", "mysql", "mssql")


def resolve_tracking_uri(uri: str | None, storage: str | Path) -> str:
    """The tracking URI to use: `uri` with a relative SQLite path made absolute (Ray changes the working directory).

    Without a `uri`: a SQLite file in the storage folder, which therefore must be local.
    Raises: ValueError if there is no `uri` and the storage is remote.
    """
    if uri is None:
        root = str(storage).removeprefix("file://")
        if "://" in root:
            raise ValueError(
                f"tracking.uri is not set and the storage {str(storage)!r} is not a local folder, so SQLite cannot lie "
                "there; set tracking.uri to an MLflow server (http://...) or to sqlite:////absolute/path/mlflow.db"
            )
        return f"sqlite:///{Path(root).expanduser().resolve() / 'mlflow.db'}"
    if (match := SQLITE.match(uri)) and uri[match.end() :] not in ("", ":memory:"):
        return f"{match.group()}{Path(uri[match.end() :]).expanduser().resolve()}"
    return uri


def check_tracking(uri: str, timeout: float = 10.0) -> None:
    """Refuse a tracking URI that cannot work, within `timeout` seconds and without creating anything.

    Raises: ValueError naming `tracking.uri`, its value (without password) and the remedy.
    """
    field_and_value = f"tracking.uri = {_without_password(uri)!r}"
    scheme = urlsplit(uri).scheme.split("+")[0]
    if SQLITE.match(uri) or scheme == "sqlite":
        _check_sqlite(uri, field_and_value)
    elif scheme in ("http", "https") or scheme in _DATABASES:
        probe = _probe_database if scheme in _DATABASES else _probe_server
        remedy = (
            "start it (mlflow server --host 127.0.0.1 --port 5000 "
            "--backend-store-uri sqlite:////absolute/path/mlflow.db), correct the address, "
            "or leave tracking.uri out to write to SQLite beside the sweep"
        )
        outcome: list[Exception | None] = []
        # A thread, because neither name resolution nor a server that sends a byte a second knows a total time limit.
        thread = threading.Thread(target=lambda: outcome.append(probe(uri)), daemon=True)
        thread.start()
        thread.join(timeout)
        if not outcome:
            raise ValueError(f"{field_and_value}: no answer within {timeout:g} s; {remedy}")
        if (error := outcome[0]) is not None:
            text = _without_password(str(error))
            if "403" in text or "401" in text:
                remedy = "give the server this host name (mlflow server --allowed-hosts), or set " + (
                    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
                )
            raise ValueError(f"{field_and_value}: it refused or failed ({text[:200]}); {remedy}") from error
    else:
        raise ValueError(
            f"{field_and_value}: MLflow no longer keeps runs in plain folders, and other stores are not supported; use "
            "sqlite:////absolute/path/mlflow.db, http(s)://host:port, or one of " + ", ".join(_DATABASES) + "://..."
        )


def _without_password(text: str) -> str:
    return re.sub(r"(://[^:/@\s]*):[^@/\s]*@", r"\1:***@", text)


def _check_sqlite(uri: str, field_and_value: str) -> None:
    path = Path(SQLITE.sub("", uri, count=1))
    if not SQLITE.match(uri) or not path.is_absolute():
        raise ValueError(
            f"{field_and_value}: not an absolute file; write sqlite:////absolute/path/mlflow.db (4 slashes)"
        )
    if "%" in str(path) or "?" in str(path):
        raise ValueError(f"{field_and_value}: MLflow cannot open a path with % or ?; choose another folder")
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{field_and_value}: {folder} is not a folder that can be written; choose another one")
    if not path.exists():
        return
    if not path.is_file() or not os.access(path, os.R_OK | os.W_OK):
        raise ValueError(f"{field_and_value}: {path} is not a file that can be written; choose another one")
    with path.open("rb") as stream:
        if stream.read(16) not in (b"", b"SQLite format 3\0"):
            raise ValueError(f"{field_and_value}: {path} exists and is no SQLite database; choose another file name")


def _probe_server(uri: str) -> Exception | None:
    """One real API call: /version answers even where the server refuses this host name or user."""
    try:
        mlflow_client(uri).search_experiments(max_results=1)
    except Exception as error:  # noqa: BLE001 - whatever fails here is the answer to the question
        return error
    return None


def _probe_database(uri: str) -> Exception | None:
    """Connect only; MLflow itself would create its tables."""
    try:
        import sqlalchemy

        sqlalchemy.create_engine(uri).connect().close()
    except Exception as error:  # noqa: BLE001 - whatever fails here is the answer to the question
        return error
    return None


def import_mlflow_ahead() -> None:
    """Import MLflow, which takes a second, in a thread: for a caller who will wait for other processes meanwhile."""

    def load() -> None:
        import mlflow  # noqa: F401

    threading.Thread(target=load, daemon=True, name="import-mlflow").start()


def mlflow_client(uri: str) -> Any:
    """A client that says nothing on the terminal and returns from a dead server within seconds, not minutes."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the outbox tries again itself; MLflow's 7 would block for minutes
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"(?s).*An input example was not provided")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)
