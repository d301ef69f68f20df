"""A folder that one process at a time works in: a run's, a comparison's."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from assay.errors import AssayError

LOCK = ".lock"
"""The file in it that is locked; it stays, for whoever comes next."""

PATIENCE = 10.0
"""Seconds to wait for another to leave: those of a killed one are on their way out."""


@contextmanager
def held(out: Path, command: str) -> Iterator[int]:
    """Holds the folder for this process and those that are given the descriptor.

    It is made where there is none.

    Raises:
        AssayError: if it is a file or cannot be written; if another, of `command`, works in it.
    """
    if out.exists() and not out.is_dir():
        raise AssayError(f"{out}: it is a file, where a folder is expected.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise AssayError(f"{out}: the folder cannot be made ({error.strerror}).") from None
    try:
        until = time.monotonic() + PATIENCE
        while not _locked(lock):
            if time.monotonic() > until:
                raise AssayError(
                    f"{out}: another {command} is at work there; wait for its end, or name another "
                    "folder."
                )
            time.sleep(0.25)
        yield lock
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nobody can be kept out
    return True
