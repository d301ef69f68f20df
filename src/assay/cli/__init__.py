"""The `assay` command: parse, call, print. Nothing is computed here, and JAX is imported late."""

import sys

from assay.cli.memory import computes, keep_memory
from assay.errors import AssayError, out_of_memory


def main() -> None:
    """Runs the command; a user's mistake is one sentence on standard error and status 2."""
    keep_memory()  # starts Python again, so it comes before all that takes time
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
