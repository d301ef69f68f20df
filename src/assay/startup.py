"""What is set once before anything is compiled."""

import os

import jax

from assay.data import cache


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the cache folder, so that the next start need not wait.

    A folder that the user has set for JAX (`JAX_COMPILATION_CACHE_DIR`) is left as it is.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache.folder() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        # With a size JAX also locks the folder: a comparison's processes share it.
        jax.config.update("jax_compilation_cache_max_size", 4 * 2**30)


def compute_in_the_calling_thread() -> None:
    """A step on one CPU device is computed by the thread that calls it, with the pool's help.

    Its memory then comes from the first thread's heap, which `cli/memory.py` has glibc keep; in
    any other thread glibc maps anew, each time, what is large. Where that was not set, and once
    JAX has its devices, nothing changes.
    """
    if "GLIBC_TUNABLES" in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
