"""A folder that one process at a time works in: a run's, a comparison's."""

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
    """Holds the folder for this process and those that it starts, until all of them are gone.

    It is made where there is none, and gone again if nothing else was put there.

    Raises:
        AssayError: if it is a file or cannot be made; if another, of `command`, is at work in it.
    """
    import fcntl

    if out.exists() and not out.is_dir():
        raise AssayError(f"{out}: it is a file, where a folder is expected.")
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssayError(f"{out}: the folder cannot be made ({error.strerror}).") from None
    lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        until = time.monotonic() + PATIENCE
        while not _locked(fcntl, lock):
            if time.monotonic() > until:
                raise AssayError(
                    f"{out}: another {command} is at work there; wait for its end, or name another "
                    "folder."
                )
            time.sleep(0.25)
        try:
            yield lock
        finally:
            if made and os.listdir(out) == [LOCK]:
                (out / LOCK).unlink()
                out.rmdir()
    finally:
        os.close(lock)


def _locked(fcntl, lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: nobody can be kept out
    return True
