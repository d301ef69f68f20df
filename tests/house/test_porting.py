"""docs/porting.md names only what there is, and says of the rest that it is on the way."""

import re
from pathlib import Path

from assay import functional
from assay.spec.presets import PRESETS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "porting.md").read_text()
MODELS = TEXT.split("### Models")[1].split("###")[0]


def test_every_function_named_is_public():
    named = set(re.findall(r"functional\.(?!py)(\w+)", TEXT))
    assert named
    assert named <= {*functional.__all__}


def test_every_preset_named_is_one():
    """A row names presets that are there, or says that they are on the way."""
    rows = [row.split("|")[1:4] for row in MODELS.splitlines() if row.startswith("| `")]
    assert len(rows) > 10
    for theirs, ours, _ in rows:
        names = re.findall(r"`([\w.-]+)`", ours)
        assert bool(names) != ("on the way" in ours), theirs
        assert {*names} <= {*PRESETS}, theirs


def test_every_path_named_is_a_field():
    run = PRESETS["glu-rope-gpt"].run.model_dump()
    paths = set(re.findall(r"`((?:model|data|compute|optimizer|train)\.[\w.*]+)[`=]", TEXT))
    assert len(paths) > 10
    for path in paths:
        at = run
        for part in path.split("."):
            at = at[0] if part in ("*", "0") else at[part]


def test_every_example_named_is_there():
    for name in re.findall(r"examples/\w+\.py", TEXT):
        assert (ROOT / name).is_file(), name
