"""The `assay` command: parse, call, print. Nothing is computed here, and JAX is imported late."""

import os
import signal
import sys
from contextlib import contextmanager, suppress

from assay.cli.memory import computes, keep_memory
from assay.errors import AssayError, out_of_memory


def main() -> None:
    """Runs the command; a user's mistake is one sentence on standard error and status 2."""
    keep_memory()  # starts Python again, so it comes before all that takes time
    with _interrupted_at_once():
        _run()


KEEPS = ("train", "compare", "demo", "convert", "data", "bench")
"""Commands with work to save, or to take away, when they are interrupted: they see to it."""


@contextmanager
def _interrupted_at_once():
    """Ctrl-C ends a command that keeps nothing, there and then.

    Python's own way is an exception wherever the program happens to be. Raised in a callback, of
    JAX's at garbage collection or of an import, it is printed and forgotten, and all goes on.
    """
    keeps = not set(KEEPS).isdisjoint(sys.argv[1:])
    if keeps or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    try:
        before = signal.signal(signal.SIGINT, _leave)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(*_) -> None:
    with suppress(Exception):  # interrupted in a write, perhaps
        sys.stdout.flush()
    os.write(2, b"assay: interrupted.\n")
    os._exit(130)


def _run() -> None:
    if computes():
        from assay.model import compiled

        compiled.begin("blas")  # on a new machine: seconds, beside the imports
    from assay.cli import (  # noqa: F401, each adds its commands
        compare,
        convert,
        data,
        describe,
        measure,
        plan,
        train,
        use,
    )
    from assay.cli.application import app

    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except AssayError as error:
        if debug:
            raise
        print(f"assay: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        if debug or error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"assay: {where}{error.strerror} (--debug shows where).", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:  # XLA's is one
        told = out_of_memory(
            error, "a smaller batch, a shorter text or --dtype bfloat16 takes less."
        )
        if debug or told is None:
            raise
        print(f"assay: {told}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("assay: interrupted.", file=sys.stderr)
        sys.exit(130)
