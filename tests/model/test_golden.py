"""Logits of every preset, shrunk, at weights drawn by name: a change of what it computes shows.

`python -m tests.model.test_golden` adds the presets that are not in the file yet; an entry that is
there is only ever changed by hand, with a reason.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from assay.evaluate.checks import at_random
from assay.model.transformer import abstract
from assay.spec.presets import PRESETS, shrink

FILE = Path(__file__).parents[1] / "golden" / "presets.json"
GOLDEN = json.loads(FILE.read_text()) if FILE.exists() else {}
SHRUNK: dict = {}
for name, preset in PRESETS.items():
    SHRUNK.setdefault(shrink(preset.model), []).append(name)


def digest(spec) -> list[float]:
    """Six logits of a row's last place, and the spread of all."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(spec.vocab_size, size=(2, 24), dtype=np.int32)
    given = {}
    if spec.encoder is not None:
        given["source"] = rng.integers(spec.vocab_size, size=(2, 10), dtype=np.int32)
    logits = np.asarray(at_random(abstract(spec), 0)(tokens, **given))
    return [round(float(x), 5) for x in (*logits[0, -1, :6], logits.std())]


def test_every_preset_is_there():
    assert {*GOLDEN} == {*PRESETS}


@pytest.mark.parametrize(
    ("spec", "names"), SHRUNK.items(), ids=[names[0] for names in SHRUNK.values()]
)
def test_logits(spec, names):
    found = digest(spec)
    for name in names:
        np.testing.assert_allclose(found, GOLDEN[name], atol=2e-4 * found[-1] + 1e-5, rtol=0)


if __name__ == "__main__":
    for spec, names in SHRUNK.items():
        if missing := [name for name in names if name not in GOLDEN]:
            GOLDEN |= dict.fromkeys(missing, digest(spec))
    lines = [f"  {json.dumps(name)}: {json.dumps(GOLDEN[name])}" for name in sorted(GOLDEN)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
