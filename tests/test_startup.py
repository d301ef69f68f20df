"""Memory: what malloc keeps of a command that computes, and what a GPU gives."""

import os
import sys

import jaxlib.xla_client
import pytest

from assay.cli import memory
from assay.train.speed import USABLE, take_what_is_planned_of_a_gpu


class StartedError(Exception):
    pass


@pytest.fixture
def begin(monkeypatch):
    def begin(*words: str, **environment: str) -> str | None:
        """What the new process would find in GLIBC_TUNABLES; None where there is no new one."""
        monkeypatch.setattr(sys, "argv", ["assay", *words])
        monkeypatch.setattr(sys, "orig_argv", ["python", "assay", *words])
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.delenv(memory.TUNABLES, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        def start(*_):
            raise StartedError(os.environ[memory.TUNABLES])

        monkeypatch.setattr(os, "execv", start)
        try:
            memory.keep_memory()
        except StartedError as started:
            return str(started)

    return begin


def test_a_command_that_computes_starts_again_with_its_memory_kept(begin):
    settings = begin("train", "nano")
    assert "hugetlb=1" in settings
    assert "mmap_max=0" in settings


def test_other_commands_help_and_a_users_own_setting_are_left_alone(begin):
    assert begin("show", "nano") is None
    assert begin("train", "--help") is None
    assert begin("train", "nano", GLIBC_TUNABLES="glibc.malloc.check=1") is None


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_gpu_gives_what_plans_count_on_unless_its_user_said_otherwise(monkeypatch, name):
    """XLA reads both names, and raises where both are set."""
    options = jaxlib.xla_client.generate_pjrt_gpu_plugin_options
    monkeypatch.setattr(os, "environ", {})
    take_what_is_planned_of_a_gpu()
    assert options()["memory_fraction"] == USABLE
    monkeypatch.setattr(os, "environ", {name: "0.5"})
    take_what_is_planned_of_a_gpu()
    assert options()["memory_fraction"] == 0.5
