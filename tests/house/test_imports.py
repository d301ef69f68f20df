"""Imports point one way: spec <- model <- train, generate, evaluate, interop, plan <- the rest."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "assay"
FILES = sorted(SOURCE.rglob("*.py"))

# What each part may import: parts, or single modules of one. EVERYONES, all may.
EVERYONES = {"errors", "face"}
MAY_IMPORT = {
    "errors": set(),
    "face": set(),
    "spec": set(),
    "model": {"spec", "data.cache"},  # what `native.py` compiles lies in the cache folder
    "data": {"spec"},  # beside model: neither knows the other
    "functional": {"spec", "model"},
    "generate": {"spec", "model", "data.tokenizers"},
    "evaluate": {"spec", "model", "data", "generate"},
    "startup": {"data.cache"},
    "folders": set(),
    # The loop scores held-out text.
    "train": {"spec", "model", "data", "evaluate", "startup", "folders"},
    "interop": {"spec", "model", "data"},
    "plan": {"spec", "model", "train"},
    "loading": {"spec", "model", "data", "train", "interop", "startup"},
    "compare": {
        *("spec", "model", "data", "train", "evaluate", "plan", "loading", "startup", "folders"),
    },
    "serve": {"spec", "model", "data", "generate", "loading"},
    "demo": {"spec", "model", "data", "train", "generate", "evaluate", "compare", "loading"},
    "bench": {"spec", "model", "data", "train", "generate", "interop", "loading", "startup"},
}
# These see everything, and nothing but one another sees them.
TOP = {"cli", "api", "__init__", "__main__"}
# Modules that keep to less than their folder may.
KEEP_TO = {
    # Reads JSON, never a model.
    "compare.report": {
        *("compare.statistics", "compare.curves", "compare.scaling", "compare.results"),
        *("compare.figures", "compare.block_diagram"),
    },
    "compare.block_diagram": set(),
    "compare.figures": set(),
    "compare.curves": {"compare.statistics"},
    "compare.results": {"spec.base"},
    "compare.scaling": {"compare.statistics"},
    "compare.statistics": set(),
}
# The extras' packages, by the names that they are imported by: only inside functions.
OPTIONAL = {
    *("torch", "transformers", "datasets", "pyarrow", "wandb", "tensorboardX", "jupyterlab"),
    *("starlette", "fastapi", "uvicorn", "ray", "lm_eval", "gguf", "IPython"),
}


def module_of(path: Path) -> str:
    """`model.layers` of src/assay/model/layers.py; a package is its `__init__`'s folder."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, and the names taken from each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, parts: set[str]) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path):
    module = module_of(path)
    part = module.split(".")[0]
    if part in TOP:
        return
    assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
    allowed = KEEP_TO.get(module, {part} | MAY_IMPORT[part]) | EVERYONES
    ours = {name.removeprefix("assay.") for name in imports(path) if within(name, {"assay"})}
    wrong = sorted(name for name in ours if not within(name, allowed))
    assert not wrong, f"{module} imports {', '.join(wrong)}"


def test_the_rules_have_no_circle():
    graph = {part: {name.split(".")[0] for name in may} for part, may in MAY_IMPORT.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_extras_are_imported_late(path):
    """The core install has none of them."""
    top = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.If)]
    names = {
        name.split(".")[0]
        for node in top
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
        if name
    }
    assert not names & OPTIONAL


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_drawer_for_odds_and_ends(path):
    assert not {"utils", "util", "helpers", "helper", "common", "misc"} & {
        path.stem,
        path.parent.name,
    }


def compared_strings(path: Path) -> Iterator[tuple[str, int]]:
    """String literals in comparisons and in `case` patterns, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        else:
            continue
        for side in sides:
            for inner in [side, *getattr(side, "elts", [])]:
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner.value, inner.lineno


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_test_of_a_models_name(path):
    from assay.spec.presets import PRESETS

    module = module_of(path)
    if within(module, {"spec.presets", "interop"}):
        return
    names = {*PRESETS} | {preset.family for preset in PRESETS.values()}
    found = [f"'{text}' in line {line}" for text, line in compared_strings(path) if text in names]
    assert not found, f"{module} asks which model it has: {', '.join(found)}"


def test_spec_needs_no_jax():
    for path in SOURCE.glob("spec/*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"jax", "jaxlib", "jaxtyping", "flax", "optax", "numpy"}, path


def loaded_after(code: str) -> set[str]:
    """The top packages in memory after a fresh Python has run some code."""
    code += "\nimport sys; print('\\n' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "torch", "matplotlib", "scipy"}


@pytest.mark.parametrize("module", ["spec.model", "spec.run", "spec.presets", "spec.accounting"])
def test_importing_a_spec_loads_no_jax(module):
    assert not loaded_after(f"import assay.{module}") & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["presets"]])
def test_help_loads_no_jax(arguments):
    code = f"""
import runpy, sys
sys.argv = ["assay", *{arguments}]
try:
    runpy.run_module("assay.cli", run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
"""
    assert not loaded_after(code) & HEAVY
