"""MODEL, as commands take it: a preset's name, a run's folder, or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from assay.errors import AssayError, did_you_mean
from assay.spec.presets import PRESETS
from assay.spec.run import ComputeSpec, RunSpec

if TYPE_CHECKING:
    from assay.data.tokenizers import Tokenizer
    from assay.model.transformer import Transformer


@dataclass(frozen=True)
class Loaded:
    """A model ready to run. `run` is there for presets and runs, `step` for runs only."""

    name: str
    model: "Transformer"
    tokenizer: "Tokenizer | None"
    run: RunSpec | None = None
    step: int | None = None


def kind_of(model: str | Path) -> str:
    """preset, run, or huggingface.

    Raises:
        AssayError: if it is none of them.
    """
    path = Path(model)
    if (path / "run.json").is_file():
        return "run"
    if (path / "config.json").is_file():
        return "huggingface"
    if str(model) in PRESETS:
        return "preset"
    if path.is_dir():
        raise AssayError(f"{model}: the folder holds neither a run.json nor a config.json.")
    raise AssayError(
        f"'{model}' is neither a preset, nor the folder of a run or of a Hugging Face model; "
        f"{did_you_mean(str(model), PRESETS)}"
    )


def load(model: str | Path, dtype: str = "float32", *, seed: int = 0) -> Loaded:
    """The model that a name or folder stands for, its tokenizer, and the run it came from.

    A preset has random parameters, drawn from `seed`, and no tokenizer but the byte one where
    its vocabulary is that.

    Raises:
        AssayError: if there is no such model, or its files are no good.
    """
    import jax

    from assay.data import tokenizers
    from assay.model.transformer import Transformer, from_named_parameters
    from assay.startup import keep_compiled_programs

    keep_compiled_programs()
    compute = ComputeSpec(dtype=dtype)
    match kind_of(model):
        case "preset":
            run = PRESETS[str(model)].run
            fits = run.model.vocab_size == tokenizers.ByteTokenizer().vocab_size
            made = jax.jit(lambda key: Transformer(run.model, compute, rngs=key))
            return Loaded(
                str(model),
                made(jax.random.key(seed)),
                tokenizers.ByteTokenizer() if fits else None,
                run,
            )
        case "run":
            from assay.train.checkpoint import restore_parameters
            from assay.train.loop import read_run

            folder = Path(model)
            run = read_run(folder)
            named, step = restore_parameters(folder / "checkpoints")
            made = from_named_parameters(run.model, named, compute)
            return Loaded(str(model), made, tokenizers.load(folder), run, step)
        case "huggingface":
            from assay.interop.huggingface import load_folder

            spec, named = load_folder(Path(model))
            made = from_named_parameters(spec, named, compute)
            return Loaded(str(model), made, tokenizers.read_file(model))
