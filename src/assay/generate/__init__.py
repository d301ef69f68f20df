"""Sampling and the decoding engine. Called, it is `assay.api.generate`."""

from assay.face import make_callable

make_callable(__name__, "generate")
