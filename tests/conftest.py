"""What holds for every test: eight CPU devices, no network, no user's cache, strict JAX.

The environment is set before JAX is imported, so that the commands that tests start inherit it.
Compiled programs are kept from one session to the next, a folder for each machine. They are not
for those commands: one that is killed while it writes would leave half a program behind.
"""

import gc
import os
import platform
import random
import shutil
import socket
import sys
import tempfile
from pathlib import Path

DEVICES = 8

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
)
# Pretrained models are fetched before the tests (scripts/), to where the user's lie.
cache = Path(os.environ.get("ASSAY_CACHE") or "~/.cache/assay").expanduser()
os.environ.setdefault("ASSAY_MODELS", str(cache / "models"))
os.environ["ASSAY_CACHE"] = tempfile.mkdtemp(prefix="assay-cache-")
os.environ["MPLBACKEND"] = "agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

PROGRAMS = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "assay-tests"
PROGRAMS /= platform.node()
# No size: with one JAX locks the folder and reads all of it at each write, a quarter of a second
# at 7,000 programs. Two that write at once cost a warning and a compile (pyproject.toml).
jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    """Programs of code that is no more are forgotten, all at once, before the tests begin."""
    first = not hasattr(config, "workerinput")  # the process that starts the workers
    if first and sum(file.stat().st_size for file in PROGRAMS.glob("*")) > 2**30:
        shutil.rmtree(PROGRAMS)


def pytest_collection_modifyitems(items):
    """A test named by a memory address has another name in each process, which xdist refuses."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: give its parameters ids")


def pytest_unconfigure():
    shutil.rmtree(os.environ["ASSAY_CACHE"], ignore_errors=True)


@pytest.fixture
def assay_command(monkeypatch, capsys):
    """Runs the command in this process: (status, standard output, standard error)."""
    from assay import cli

    def run(*arguments):
        capsys.readouterr()  # what others wrote before
        monkeypatch.setattr(sys, "argv", ["assay", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _few_mappings():
    """Forget compiled programs before the kernel's limit of mappings is near.

    Each program takes a mapping or more, a process may have 65,530 of them by default, and the
    compiler then ends in a segmentation fault (two workers did, near the suite's end).
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_to_compile():
    """These programs are run for milliseconds: XLA is not to spend seconds on making them fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A test may talk to itself, and to nobody else."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a test tried to reach {address[0]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
