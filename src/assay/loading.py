"""MODEL, as commands take it.

A preset's name; a run's folder; a Hugging Face folder, or an id of the Hub (`owner/name`); a
`.gguf` file; a model folder that `assay convert` wrote; or the name of a pretrained model. Where
no parameters are needed, also a `.json` file of a spec: of a model, or of a run.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.errors import AssayError, did_you_mean
from assay.spec import presets
from assay.spec.model import TransformerSpec
from assay.spec.presets import PRESETS
from assay.spec.run import ComputeSpec, DataSpec, RunSpec

if TYPE_CHECKING:
    from assay.data.tokenizers import Tokenizer
    from assay.interop.convert import Source
    from assay.model.transformer import Transformer


@dataclass(frozen=True)
class Loaded:
    """A model ready to run. `run` is there for presets and runs, `step` for runs only.

    `start_token` is the id that a target begins with, where the files name one; `end_tokens` are
    those that end a text, besides the tokenizer's own.
    """

    name: str
    model: "Transformer"
    tokenizer: "Tokenizer | None"
    run: RunSpec | None = None
    step: int | None = None
    start_token: int | None = None
    end_tokens: tuple[int, ...] = ()


def kind_of(model: str | Path) -> str:
    """preset, spec (a .json file), run, assay (a model folder), huggingface, gguf, hub, pretrained.

    Raises:
        AssayError: if it is none of them, or a pickle.
    """
    from assay.interop import hub

    if (kind := _known_kind(model)) is not None:
        return kind
    raise AssayError(
        f"'{model}' is neither a preset, nor a folder of a run or of a model, nor a .gguf file, "
        f"nor a spec's .json file, nor an id of the Hugging Face Hub; "
        f"{did_you_mean(model, [*PRESETS, *hub.PRETRAINED])}"
    )


def _known_kind(model: str | Path) -> str | None:
    """`kind_of`, or None where the name is that of nothing."""
    from assay.interop import hub

    path, name = Path(model), str(model)
    if (path / "run.json").is_file():
        return "run"
    if (path / "assay_model.json").is_file():
        return "assay"
    if (path / "config.json").is_file():
        return "huggingface"
    if path.is_file():
        return _kind_of_file(path)
    if name in PRESETS:
        return "preset"
    if name in hub.PRETRAINED:
        return "pretrained"
    if path.is_dir():
        raise AssayError(f"{model}: the folder holds no run.json, assay_model.json or config.json.")
    if hub.is_id(name) and not path.parent.is_dir() and path.suffix != ".json":
        return "hub"
    if path.suffix in (".gguf", ".json"):
        raise AssayError(f"{model}: there is no such file.")
    return None


def _kind_of_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return "gguf"
    if path.suffix == ".json":
        return "spec"
    from assay.interop.tensor_files import PICKLES, refuse_pickle

    if path.suffix in PICKLES:
        raise refuse_pickle(path)
    raise AssayError(
        f"{path}: is no model; of files, only .gguf ones are, and a spec's .json. Name the folder."
    )


def spec_of(model: str | Path) -> TransformerSpec:
    """The architecture alone; no weights are read.

    Raises:
        AssayError: as `load`.
    """
    return run_of(model).model


def run_of(model: str | Path) -> RunSpec:
    """The run of a preset, a run's folder or a run's spec; of others, the model in a default run.

    Raises:
        AssayError: as `load`.
    """
    match kind_of(model):
        case "preset":
            return PRESETS[str(model)].run
        case "run" | "spec":
            return read_spec(model)
        case "gguf":
            from assay.interop.gguf import GgufFile

            return _default_run(GgufFile(model).spec)
        case "assay":
            from assay.interop.convert import read_model_file

            spec = read_model_file(Path(model))["spec"]
            return _default_run(TransformerSpec.from_data(spec))
        case "pretrained":
            from assay.interop import hub

            return run_of(hub.local_or_hub(str(model)))
        case "hub":
            from assay.interop import hub

            model = hub.fetch(str(model), weights=False)
    from assay.interop.huggingface import read_config, spec_from_config

    return _default_run(spec_from_config(read_config(model)))


def _default_run(spec: TransformerSpec) -> RunSpec:
    packing = "stream" if spec.encoder is None else "pairs"
    return RunSpec(model=spec, data=DataSpec(packing=packing, seq_len=min(spec.context, 256)))


def untrained(name: str) -> RunSpec:
    """What training begins with, at random parameters: the run of a preset, or of a spec's file.

    Raises:
        AssayError: if it is neither.
    """
    if name in PRESETS or (kind := _known_kind(name)) is None:
        return presets.get(name).run
    if kind == "spec":
        return read_spec(name)
    what = "a run" if kind == "run" else "a trained model"
    raise AssayError(
        f"{name}: is {what}, but training begins from random parameters: name a preset or a "
        f"spec's .json file, for the architecture. A run is gone on with by: assay train --resume "
        f"--out {name if kind == 'run' else 'RUN'}"
    )


def read_spec(path: str | Path) -> RunSpec:
    """The run that a JSON file describes, or a default run of the model that it describes.

    Of a run's folder, its `run.json`.

    Raises:
        AssayError: if it is neither; the file and the field are named.
    """
    found = _described(Path(path))
    return found if isinstance(found, RunSpec) else _default_run(found)


def has_run(model: str | Path) -> bool:
    """Whether it says how it is trained: a run's folder, or a run's spec. A preset's is advice."""
    kind = kind_of(model)
    return kind == "run" or (kind == "spec" and isinstance(_described(Path(model)), RunSpec))


def _described(path: Path) -> RunSpec | TransformerSpec:
    file = path / "run.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AssayError(f"{file}: there is no such file.") from None
    except (OSError, ValueError) as error:
        raise AssayError(f"{file}: is no JSON file: {error}.") from None
    if isinstance(data, dict) and "model_type" in data:
        raise AssayError(f"{file}: is a Hugging Face model's configuration; name its folder.")
    if isinstance(data, dict) and isinstance(data.get("spec"), dict):
        data = data["spec"]  # of run.json, which says more
    keys = {*data} if isinstance(data, dict) else set()
    of_model, of_run = ({*spec.model_fields} for spec in (TransformerSpec, RunSpec))
    if not keys & (of_model | of_run):
        found = f"the fields {', '.join(sorted(keys)[:5])}" if keys else "no fields"
        raise AssayError(
            f"{file}: is neither a model's spec (vocab_size, d_model, context, decoder, ...) nor a "
            f"run's (model, data, optimizer, ...); found {found}."
        )
    try:
        if "model" in keys or not keys & of_model:
            return RunSpec.from_data(data)
        return TransformerSpec.from_data(data)
    except AssayError as error:
        raise AssayError(f"{file}: {error}") from None


def open_source(model: str | Path) -> "Source":
    """A checkpoint as `assay convert` reads it: nothing but what it says of itself is read yet.

    Raises:
        AssayError: if there is no such model, it is a preset, or its files are no good.
    """
    from assay.interop import convert, hub

    match _known_kind(model):
        case None:
            raise AssayError(
                f"'{model}' is neither a folder of a run or of a model, nor a .gguf file, nor an "
                f"id of the Hugging Face Hub (owner/name), nor {' or '.join(hub.PRETRAINED)}."
            )
        case "preset":
            raise AssayError(f"{model}: a preset has no weights; train it first.")
        case "spec":
            raise _no_parameters(model)
        case "run":
            from assay.data import tokenizers
            from assay.train.checkpoint import restore_parameters
            from assay.train.loop import read_run

            folder = Path(model)
            named, _ = restore_parameters(folder / "checkpoints")
            spec = read_run(folder).model
            return convert.open_run(folder, spec, named, tokenizers.load(folder))
        case "gguf":
            return convert.open_gguf(Path(model))
        case "assay":
            return convert.open_model_folder(Path(model))
        case "pretrained":
            return open_source(hub.local_or_hub(str(model)))
        case "hub":
            return convert.open_huggingface(hub.fetch(str(model)))
    return convert.open_huggingface(Path(model))


def _no_parameters(model: str | Path) -> AssayError:
    how = f"assay train {shlex.quote(str(model))}"
    return AssayError(f"{model}: is a spec, which has no parameters: train it first ({how}).")


def load(model: str | Path, dtype: str = "float32", *, seed: int = 0, mesh: Any = None) -> Loaded:
    """The model that a name or folder stands for, its tokenizer, and the run it came from.

    A preset has random parameters, drawn from `seed`, and no tokenizer but the byte one where
    its vocabulary is that. With a `jax.sharding.Mesh` each device gets its own part: files and
    checkpoints are read shard by shard, and a preset's parameters are drawn in their places.

    Raises:
        AssayError: if there is no such model, or its files are no good.
    """
    from assay.data import tokenizers
    from assay.interop.convert import place, places_of
    from assay.model.transformer import from_named_parameters
    from assay.startup import compute_in_the_calling_thread, keep_compiled_programs

    keep_compiled_programs()
    compute_in_the_calling_thread()
    compute = ComputeSpec(dtype=dtype)
    match kind_of(model):
        case "preset":
            run = PRESETS[str(model)].run
            fits = run.model.vocab_size == tokenizers.ByteTokenizer().vocab_size
            return Loaded(
                str(model),
                _drawn(run.model, compute, seed, mesh),
                tokenizers.ByteTokenizer() if fits else None,
                run,
            )
        case "spec":
            raise _no_parameters(model)
        case "run":
            from assay.train.checkpoint import restore_parameters
            from assay.train.loop import read_run

            folder = Path(model)
            run = read_run(folder)
            places = None if mesh is None else places_of(run.model, mesh)
            named, step = restore_parameters(folder / "checkpoints", places=places)
            made = from_named_parameters(run.model, named, compute)
            return Loaded(str(model), made, tokenizers.load(folder), run, step)
    source = open_source(model)
    named = place(source.entries("assay", source.spec, None, None), source.spec, mesh)
    made = from_named_parameters(source.spec, named, compute)
    begins = source.start_token if source.spec.encoder is not None else None
    return Loaded(
        str(model), made, source.tokenizer, start_token=begins, end_tokens=source.end_tokens
    )


def _drawn(spec: TransformerSpec, compute: ComputeSpec, seed: int, mesh: Any) -> "Transformer":
    """A model with random parameters."""
    import jax
    from flax import nnx

    from assay.model.sharding import parameter_shardings
    from assay.model.transformer import Transformer, abstract

    key = jax.random.key(seed)
    if mesh is None:
        return jax.jit(lambda key: Transformer(spec, compute, rngs=key))(key)
    model = abstract(spec, compute)
    draw = jax.jit(
        lambda key: nnx.to_pure_dict(nnx.state(Transformer(spec, compute, rngs=key), nnx.Param)),
        out_shardings=parameter_shardings(model, mesh),
    )
    return nnx.merge(nnx.graphdef(model), draw(key))
