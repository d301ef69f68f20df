"""Files that can be made again: where they lie, and how none is ever seen half written."""

import os
import secrets
from pathlib import Path

from assay.errors import AssayError


def folder() -> Path:
    """`$ASSAY_CACHE`, or `~/.cache/assay`. It need not exist yet."""
    return Path(os.environ.get("ASSAY_CACHE") or Path.home() / ".cache" / "assay")


def write(path: Path, content: bytes) -> None:
    """Writes a whole file or none: beside the target first, then renamed over it.

    Raises:
        AssayError: if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        try:
            with draft.open("xb") as file:  # for whom the umask says; tempfile's are the owner's
                file.write(content)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> AssayError:
    another = ""
    if path.absolute().is_relative_to(folder().absolute()):
        another = "; the environment variable ASSAY_CACHE names another cache folder"
    return AssayError(f"{path}: cannot be written ({error.strerror or error}){another}.")
