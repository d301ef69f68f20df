"""The one kind of error that a user is meant to read.

Every message is a plain sentence that names the field or file, what was found, what is legal,
and, where a name was misspelt, the nearest right one.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class AssayError(Exception):
    """A mistake in the input, told in one sentence. The command exits with status 2."""


def did_you_mean(name: object, legal: Iterable[str], *, limit: int = 12) -> str:
    """Ends an error sentence: the nearest legal names, or the legal ones where none is near.

    Returns `"did you mean 'a' or 'b'?"` or `"legal are: a, b, c."`, never an empty string.
    """
    legal = list(legal)
    near = get_close_matches(str(name), legal, n=2, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    if not legal:
        return "nothing is legal here."
    shown = ", ".join(legal[:limit])
    return f"legal are: {shown}{', …' if len(legal) > limit else ''}."


def counted(number: int, noun: str) -> str:
    """1 shard, 2 shards."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def check_text(where: str, text: Any) -> None:
    """Raises AssayError if it is no text, or cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise AssayError(f"{where} is {type(text).__name__}, not text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise AssayError(
            f"{where} has half a surrogate pair at character {error.start}, which is not text."
        ) from None


def out_of_memory(error: Exception, ways_out: str) -> AssayError | None:
    """What XLA says where its memory is used up, as a sentence; None if that is not the matter."""
    if not str(error).startswith("RESOURCE_EXHAUSTED"):
        return None
    wanted = re.search(r"allocat\w+ (\d+) bytes", str(error))
    size = f" for {int(wanted[1]) / 2**30:,.1f} GiB more" if wanted else ""
    return AssayError(f"memory: there is no room{size}; {ways_out}")


def need_extra(package: str, extra: str, purpose: str) -> AssayError:
    """The error for an optional package that is not installed."""
    return AssayError(
        f"{purpose} needs the package '{package}', which is not installed; {how_to_get(extra)}."
    )


def how_to_get(extra: str) -> str:
    """What installs an extra, or the group `parity`, in a clone, as Assay itself is installed."""
    option = "--group parity" if extra == "parity" else f"-e '.[{extra}]'"
    return f"in Assay's folder: make dev, or uv pip install {option}"
