"""Assay: decide which transformer to train.

    import assay

    loaded = assay.load("runs/first")
    print(assay.generate(loaded, "The for statement", max_new_tokens=50).text)

Names are imported when first used, so that `import assay` costs nothing.
"""

import os
from glob import glob
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from assay.errors import AssayError

# The planner's TPU compiler (libtpu) makes JAX look for TPUs, loudly, where there are none. Where
# neither a TPU nor a GPU is, JAX is told so before anybody imports it.
if (
    "JAX_PLATFORMS" not in os.environ
    and not (glob("/dev/accel*") or glob("/dev/vfio/[0-9]*") or glob("/dev/nvidia[0-9]*"))
    and find_spec("libtpu")
):
    os.environ["JAX_PLATFORMS"] = "cpu"

if TYPE_CHECKING:
    from assay.api import compare, generate, preset, train
    from assay.loading import load
    from assay.model.transformer import Transformer
    from assay.spec.model import TransformerSpec
    from assay.spec.run import RunSpec

__all__ = [
    "AssayError",
    "RunSpec",
    "Transformer",
    "TransformerSpec",
    "compare",
    "generate",
    "load",
    "preset",
    "train",
]

_PLACES = {
    "RunSpec": "assay.spec.run",
    "Transformer": "assay.model.transformer",
    "TransformerSpec": "assay.spec.model",
    "load": "assay.loading",
    "preset": "assay.api",
}

_PACKAGES = ("compare", "generate", "train")  # packages that can be called


def __getattr__(name: str) -> Any:
    if name not in _PLACES and name not in _PACKAGES:
        raise AttributeError(f"module 'assay' has no attribute '{name}'")
    from importlib import import_module

    if name in _PACKAGES:
        return import_module(f"assay.{name}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
