"""C++ of this package, compiled on this machine at its first use and kept in the cache folder."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import jax

from assay.data import cache as files


class NotCompiledError(Exception):
    """Why there is no library, as a sentence."""


def library(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The shared library of one source file, compiled if it was not yet for this machine.

    Raises:
        NotCompiledError: if that is turned off, or there is no compiler, or it failed.
    """
    if os.environ.get("ASSAY_NATIVE") == "0":
        raise NotCompiledError("ASSAY_NATIVE is 0.")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NotCompiledError("there is no C++ compiler (c++, g++ or clang++).")
    flags = (*flags, "-std=c++20", "-shared", "-fPIC", "-w")
    name = hashlib.sha256(
        b"\0".join(
            (
                source.read_bytes(),
                *map(str.encode, (jax.__version__, compiler, *flags, *processor_features())),
            )
        )
    ).hexdigest()
    path = files.folder() / "native" / f"{name[:32]}.so"
    try:
        if not path.is_file():
            _compile([compiler, *flags, "-I", jax.ffi.include_dir(), str(source)], path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise NotCompiledError(f"{source.name} did not compile ({error}).") from error


def _compile(command: list[str], path: Path) -> None:
    """Compiles beside the target and renames, so that none is ever seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        subprocess.run([*command, "-o", draft], check=True, capture_output=True, timeout=300)
        os.chmod(draft, 0o755)
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def processor_features() -> list[str]:
    """What the processor can do, in the kernel's words; nothing where it does not say."""
    return sorted(_told("flags").split())


def processor_is(vendor: str) -> bool:
    """Whether the kernel names this vendor: GenuineIntel, AuthenticAMD."""
    return _told("vendor_id") == vendor


@lru_cache(maxsize=4)
def _told(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((x.split(":")[1].strip() for x in lines if x.split("\t")[0] == name), "")
