"""Where sweeps live: a local or shared folder, checked before anything starts."""

import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from dualsweep.orchestration.config import ConfigError


def storage_root(storage: str) -> Path:
    """The storage folder as an absolute path.

    Raises: ConfigError for a remote URI: workers write through the file system, so object stores are mounted.
    """
    scheme = urlsplit(storage).scheme
    if scheme == "file":
        storage = urlsplit(storage).path
    elif scheme:
        raise ConfigError(
            f"storage: {storage!r} is a remote URI; give a folder that every node sees (NFS, EFS, or the bucket mounted with "
            "s3fs, gcsfuse or mountpoint-s3)"
        )
    return Path(storage).expanduser().absolute()


def check_writable(root: Path) -> None:
    """Raises: ConfigError when the folder, or the nearest one above it that exists, cannot be written. Leaves nothing behind."""
    nearest = root
    try:
        while not nearest.exists():
            nearest = nearest.parent
    except OSError as error:
        raise ConfigError(
            f"storage: {root} cannot be a folder ({os.strerror(error.errno or 0)}); give another folder with storage=PATH"
        ) from None
    if not nearest.is_dir():
        raise ConfigError(f"storage: {nearest} is a file, not a folder; give another folder with storage=PATH")
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".dualsweep-check-"):
            pass
    except OSError as error:
        raise ConfigError(
            f"storage: {root} is not writable ({os.strerror(error.errno or 0)}); give another folder with storage=PATH"
        ) from None
