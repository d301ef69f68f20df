"""The memory of a command that computes, in huge pages."""

import os
import sys

COMPUTES = ("train", "bench", "compare", "demo", "eval", "check")
TUNABLES = "GLIBC_TUNABLES"


def use_huge_pages() -> None:
    """Starts this process again with memory in huge pages, where that makes a difference.

    XLA takes a step's memory from malloc and gives it back after each step; in pages of 4 kB the
    faults alone cost 10 to 15 % of a step. glibc reads its settings when a process starts, so
    it must start again. A setting of the user's own is left as it is.
    """
    computes = len(sys.argv) > 1 and sys.argv[1] in COMPUTES and "--help" not in sys.argv
    own = sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1 :] == sys.argv[1:]  # not a guest
    if not (computes and own and sys.platform.startswith("linux")) or TUNABLES in os.environ:
        return
    os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
