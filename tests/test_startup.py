"""A command that computes starts again with memory that malloc keeps."""

import os
import sys

import pytest

from assay.cli import memory


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
