"""C++ of this package, compiled on this machine at its first use and kept in the cache folder.

Nothing of JAX is imported here, so that a command can begin to compile before it imports it.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from assay.data import cache as files

SOURCES = {
    "blas": ("-O2", "-fopenmp-simd", "-fno-math-errno"),
    "native": ("-O3",),
}
"""Files of this folder, and what each wants of the compiler."""
FLAGS = ("-march=native", "-pthread", "-std=c++20", "-shared", "-fPIC", "-w")
MKL = ("intel_lp64", "sequential", "core")
"""What MKL is linked of: integers of 32 bits, one thread."""
_compiling = threading.Lock()


class NotCompiledError(Exception):
    """Why there is no library, as a sentence."""


def begin(name: str) -> None:
    """Compiles beside whatever comes next, so that `library` finds it done."""
    threading.Thread(target=_begun, args=(name,), daemon=True).start()


def _begun(name: str) -> None:
    for libraries in _linked(name):
        with contextlib.suppress(NotCompiledError):  # `library` will say it
            _compiled(name, libraries)
            return


def library(name: str) -> ctypes.CDLL:
    """The shared library of one source file, compiled if it was not yet for this machine.

    Where it does not link with MKL, or does not load, it is the one without.

    Raises:
        NotCompiledError: if that is turned off, or there is no compiler, or it failed.
    """
    for libraries in _linked(name):
        try:
            return ctypes.CDLL(str(_compiled(name, libraries)))
        except NotCompiledError as error:
            failed = error
        except OSError as error:
            failed = NotCompiledError(f"{name}.cc did not load ({error}).")
    raise failed


def _linked(name: str) -> tuple[tuple[str, ...], ...]:
    """What the library is linked with, the first that works."""
    return (mkl(), ()) if name == "blas" and mkl() else ((),)


def _compiled(name: str, libraries: tuple[str, ...]) -> Path:
    if os.environ.get("ASSAY_NATIVE") == "0":
        raise NotCompiledError("ASSAY_NATIVE is 0.")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise NotCompiledError("there is no C++ compiler (c++, g++ or clang++).")
    source, flags = Path(__file__).with_name(f"{name}.cc"), (*SOURCES[name], *FLAGS)
    versions = (metadata.version("jaxlib"), compiler, *flags, *libraries, *processor_features())
    key = hashlib.sha256(b"\0".join((source.read_bytes(), *map(str.encode, versions))))
    path = files.folder() / "native" / f"{key.hexdigest()[:32]}.so"
    headers = Path(importlib.util.find_spec("jaxlib").origin).parent / "include"
    failed = path.with_suffix(".failed")
    try:
        with _compiling:
            if libraries and failed.is_file():  # not tried again at each start
                raise NotCompiledError(f"{name}.cc did not compile with {libraries[-1]}.")
            if not path.is_file():
                _compile([compiler, *flags, "-I", str(headers), str(source), *libraries], path)
    except (OSError, subprocess.SubprocessError) as error:
        if isinstance(error, subprocess.CalledProcessError) and libraries:
            failed.touch()
        raise NotCompiledError(f"{name}.cc did not compile ({error}).") from error
    return path


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


def mkl() -> tuple[str, ...]:
    """What links Intel's MKL, where the extra is there and the processor is Intel's; else nothing.

    It must be linked: loaded by its own `libmkl_rt`, its names would be seen by everyone, and
    PyTorch's products, which have an MKL of their own, then run in one thread.
    """
    folder = Path(sys.prefix) / "lib"
    core = max(folder.glob("libmkl_core.so.*"), default=None)
    if core is None or not processor_is("GenuineIntel"):
        return ()
    found = [core.with_name(core.name.replace("core", part)) for part in MKL]
    if not all(map(Path.is_file, found)):
        return ()
    return ("-DMKL", "-Wl,--no-as-needed", *map(str, found), f"-Wl,-rpath,{folder}")


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
