"""Trains the run of a JSON file in a process of its own, to be killed from outside."""

import sys
from pathlib import Path

from assay.spec.run import RunSpec
from assay.train.loop import train

if __name__ == "__main__":
    result = train(RunSpec.from_json(Path(sys.argv[1]).read_text()), sys.argv[2])
    print(result.stopped_by, file=sys.stderr)
