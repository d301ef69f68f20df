"""The memory of a command that computes: in huge pages, and kept."""

import os
import sys

COMPUTES = ("train", "bench", "compare", "demo", "eval", "check")
TUNABLES = "GLIBC_TUNABLES"
SETTINGS = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        # What is large comes from the heap too, and what is freed stays in it.
        "glibc.malloc.mmap_max=0",
        f"glibc.malloc.trim_threshold={2**40}",
    )
)


def computes() -> bool:
    """Whether the command given is one that computes, and not only asked for help."""
    return len(sys.argv) > 1 and sys.argv[1] in COMPUTES and "--help" not in sys.argv


def keep_memory() -> None:
    """Starts this process again with memory in huge pages that malloc keeps.

    XLA takes a step's memory from malloc and gives it back after each step; touching it anew
    costs 5 to 15 % of a step (docs/performance.md). glibc reads its settings when a process
    starts, so it must start again. A setting of the user's own is left as it is.
    """
    own = sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :] == sys.argv[1:]  # not a guest
    if not (computes() and own and sys.platform.startswith("linux")) or TUNABLES in os.environ:
        return
    os.environ[TUNABLES] = SETTINGS
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
