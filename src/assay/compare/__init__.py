"""Experiments: variants, seeds, statistics, reports. Called, it is `assay.api.compare`."""

from assay.face import make_callable

make_callable(__name__, "compare")
