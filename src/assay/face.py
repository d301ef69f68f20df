"""`assay.train(...)` and `assay.train.loop` are both there: a package that can be called."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(package: str, function: str) -> None:
    """Calling the package calls that function of `assay.api`."""

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(import_module("assay.api"), function)(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage
