"""Loss, optimizer, step, loop, checkpoints. Called, it is `assay.api.train`."""

from assay.face import make_callable

make_callable(__name__, "train")
