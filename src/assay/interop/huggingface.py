"""Hugging Face checkpoints, both ways: one declarative table of names a family.

A row says which of our parameters one tensor of theirs holds, and in what form. The same row is
read in either direction, one tensor at a time, so that nothing needs the whole model at once.
Rows of parts that an architecture does not have (biases, a head of its own) fall away.

Their config.json is `huggingface_config`'s. Source: the modelling files of `transformers` 5.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from assay.errors import AssayError
from assay.interop.huggingface_config import (
    config_from_spec,
    family_of,
    known_family,
    model_type,
    spec_from_config,
)
from assay.model.transformer import abstract, named_parameters
from assay.spec.model import TransformerSpec

__all__ = [
    "Tensor",
    "config_from_spec",
    "from_huggingface",
    "iterate_ours",
    "iterate_theirs",
    "layout",
    "load_folder",
    "save_folder",
    "spec_from_config",
    "to_huggingface",
]

Shape = tuple[int, ...]

# ---------------------------------------------------------------------------- forms


@dataclass(frozen=True)
class Form:
    """An invertible change of form between some arrays of ours and one tensor of theirs."""

    name: str
    shape: Callable[[Sequence[Shape]], Shape]
    to_theirs: Callable[[Sequence[np.ndarray]], np.ndarray]
    to_ours: Callable[[np.ndarray, Sequence[Shape]], Sequence[np.ndarray]]


SAME = Form(
    "same",
    shape=lambda shapes: shapes[0],
    to_theirs=lambda arrays: arrays[0],
    to_ours=lambda tensor, shapes: [tensor],
)
TRANSPOSED = Form(  # torch.nn.Linear keeps (out, in), we (in, out)
    "transposed",
    shape=lambda shapes: shapes[0][::-1],
    to_theirs=lambda arrays: arrays[0].T,
    to_ours=lambda tensor, shapes: [tensor.T],
)
FUSED = Form(  # GPT-2's Conv1D keeps (in, out), with q, k and v side by side in the last axis
    "fused",
    shape=lambda shapes: (*shapes[0][:-1], sum(shape[-1] for shape in shapes)),
    to_theirs=lambda arrays: np.concatenate(arrays, axis=-1),
    to_ours=lambda tensor, shapes: np.split(
        tensor, np.cumsum([shape[-1] for shape in shapes[:-1]]), axis=-1
    ),
)

# ---------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Row:
    """Parameters of ours, the tensor of theirs that holds them, and its form.

    `vocab` marks a tensor whose first axis counts tokens: rows that only pad our table are left
    out on the way there, and are zeros on the way back. `{e}` in their name is an expert: they
    have a tensor for each, we one array with experts in its first axis.
    """

    ours: str | tuple[str, ...]
    theirs: str
    form: Form = SAME
    vocab: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclass(frozen=True)
class Table:
    """A family's rows. `prefix` is the part of their names that a bare model leaves out."""

    prefix: str
    rows: tuple[Row, ...]


_QKV = ("layers.{i}.attention.q", "layers.{i}.attention.k", "layers.{i}.attention.v")

GPT2 = Table(
    "transformer.",
    (
        Row("embedding.table", "transformer.wte.weight", vocab=True),
        Row("embedding.positions", "transformer.wpe.weight"),
        Row("layers.{i}.attention_norm.scale", "transformer.h.{i}.ln_1.weight"),
        Row("layers.{i}.attention_norm.bias", "transformer.h.{i}.ln_1.bias"),
        Row(tuple(f"{x}.w" for x in _QKV), "transformer.h.{i}.attn.c_attn.weight", FUSED),
        Row(tuple(f"{x}.b" for x in _QKV), "transformer.h.{i}.attn.c_attn.bias", FUSED),
        Row("layers.{i}.attention.o.w", "transformer.h.{i}.attn.c_proj.weight"),
        Row("layers.{i}.attention.o.b", "transformer.h.{i}.attn.c_proj.bias"),
        Row("layers.{i}.feed_forward_norm.scale", "transformer.h.{i}.ln_2.weight"),
        Row("layers.{i}.feed_forward_norm.bias", "transformer.h.{i}.ln_2.bias"),
        Row("layers.{i}.feed_forward.up.0.w", "transformer.h.{i}.mlp.c_fc.weight"),
        Row("layers.{i}.feed_forward.up.0.b", "transformer.h.{i}.mlp.c_fc.bias"),
        Row("layers.{i}.feed_forward.down.w", "transformer.h.{i}.mlp.c_proj.weight"),
        Row("layers.{i}.feed_forward.down.b", "transformer.h.{i}.mlp.c_proj.bias"),
        Row("final_norm.scale", "transformer.ln_f.weight"),
        Row("final_norm.bias", "transformer.ln_f.bias"),
        Row("head.w", "lm_head.weight", TRANSPOSED, vocab=True),
    ),
)


def _linear(ours: str, theirs: str) -> tuple[Row, Row]:
    return (
        Row(f"layers.{{i}}.{ours}.w", f"model.layers.{{i}}.{theirs}.weight", TRANSPOSED),
        Row(f"layers.{{i}}.{ours}.b", f"model.layers.{{i}}.{theirs}.bias"),
    )


LLAMA = Table(
    "model.",
    (
        Row("embedding.table", "model.embed_tokens.weight", vocab=True),
        Row("layers.{i}.attention_norm.scale", "model.layers.{i}.input_layernorm.weight"),
        *_linear("attention.q", "self_attn.q_proj"),
        *_linear("attention.k", "self_attn.k_proj"),
        *_linear("attention.v", "self_attn.v_proj"),
        *_linear("attention.o", "self_attn.o_proj"),
        Row(
            "layers.{i}.feed_forward_norm.scale", "model.layers.{i}.post_attention_layernorm.weight"
        ),
        *_linear("feed_forward.gate", "mlp.gate_proj"),
        *_linear("feed_forward.up.0", "mlp.up_proj"),
        *_linear("feed_forward.down", "mlp.down_proj"),
        Row("final_norm.scale", "model.norm.weight"),
        Row("head.w", "lm_head.weight", TRANSPOSED, vocab=True),
    ),
)
QWEN3 = Table(
    "model.",
    (
        *LLAMA.rows,
        Row("layers.{i}.attention.q_norm.scale", "model.layers.{i}.self_attn.q_norm.weight"),
        Row("layers.{i}.attention.k_norm.scale", "model.layers.{i}.self_attn.k_norm.weight"),
    ),
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """The router's row and those of gated experts, by their names."""
    ours, theirs = "layers.{i}.feed_forward", f"model.layers.{{i}}.{block}"
    pairs = {"gate": gate, "up.0": up, "down": down}
    return (
        Row(f"{ours}.router.w", f"{theirs}.gate.weight", TRANSPOSED),
        *(
            Row(f"{ours}.experts.{name}.w", f"{theirs}.experts.{{e}}.{other}.weight", TRANSPOSED)
            for name, other in pairs.items()
        ),
    )


MIXTRAL = Table("model.", (*LLAMA.rows, *_experts("block_sparse_moe", "w1", "w3", "w2")))
QWEN3_MOE = Table("model.", (*QWEN3.rows, *_experts("mlp", "gate_proj", "up_proj", "down_proj")))

TABLES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "mixtral": MIXTRAL,
    "olmoe": QWEN3_MOE,
    "qwen3_moe": QWEN3_MOE,
}
"""`model_type` -> its table."""

BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
"""Tensors of theirs that hold no parameter: causal masks and rotary frequencies of old files."""

HEAD = "lm_head.weight"

# ---------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint of theirs, and the parameters of ours that it holds.

    Of an `expert`, it holds one entry of our array's first axis.
    """

    name: str
    shape: Shape
    row: Row
    ours: tuple[str, ...]
    our_shapes: tuple[Shape, ...]
    vocab_size: int
    expert: int | None = None

    def to_theirs(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        tensor = self.row.form.to_theirs(arrays)
        return np.ascontiguousarray(tensor[: self.vocab_size] if self.row.vocab else tensor)

    def to_ours(self, tensor: np.ndarray) -> Sequence[np.ndarray]:
        padding = self._padded_shape[0] - tensor.shape[0]
        if padding:
            tensor = np.pad(tensor, ((0, padding), (0, 0)))
        return self.row.form.to_ours(tensor, self.our_shapes)

    @property
    def _padded_shape(self) -> Shape:
        return self.row.form.shape(self.our_shapes)


def layout(spec: TransformerSpec, family: str | None = None) -> list[Tensor]:
    """Every tensor of this architecture's checkpoint: the tables, then layer by layer.

    Raises:
        AssayError: if a parameter has no place in the family's table.
    """
    family = known_family(family or family_of(spec))
    shapes = {name: leaf.shape for name, leaf in named_parameters(abstract(spec)).items()}
    tensors, placed = [], set()

    def place(row: Row, i: int) -> None:
        ours = tuple(name.format(i=i) for name in row.names)
        if not all(name in shapes for name in ours):
            return  # a part that this architecture does not have
        our_shapes = tuple(shapes[name] for name in ours)
        if "{e}" in row.theirs:
            one = tuple(shape[1:] for shape in our_shapes)
            for e in range(our_shapes[0][0]):
                name = row.theirs.format(i=i, e=e)
                tensor = Tensor(name, row.form.shape(one), row, ours, one, spec.vocab_size, e)
                tensors.append(tensor)
            placed.update(ours)
            return
        shape = row.form.shape(our_shapes)
        if row.vocab:
            shape = (spec.vocab_size, *shape[1:])
        theirs = row.theirs.format(i=i)
        tensors.append(Tensor(theirs, shape, row, ours, our_shapes, spec.vocab_size))
        placed.update(ours)

    rows = TABLES[family].rows
    for row in rows:
        if "{i}" not in row.theirs:
            place(row, 0)
    for i in range(spec.decoder.num_layers):
        for row in rows:
            if "{i}" in row.theirs:
                place(row, i)
    for name in shapes:
        if name not in placed:
            raise AssayError(f"{name}: the family '{family}' has no tensor for this parameter.")
    return tensors


def iterate_theirs(
    named: Mapping[str, Array], spec: TransformerSpec, family: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors one by one, made of ours; each keeps the dtype that it has.

    Raises:
        AssayError: if a parameter is missing, or has another shape than the spec's.
    """
    for tensor in layout(spec, family):
        arrays = []
        for name, shape in zip(tensor.ours, tensor.our_shapes, strict=True):
            if name not in named:
                raise AssayError(f"{name}: this parameter is missing.")
            array = np.asarray(named[name])
            if tensor.expert is not None and tensor.expert < len(array):
                array = array[tensor.expert]
            arrays.append(array)
            _check_shape(name, array.shape, shape)
        yield tensor.name, tensor.to_theirs(arrays)


def iterate_ours(
    tensors: Mapping[str, np.ndarray], spec: TransformerSpec, family: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters one by one, made of theirs; each keeps the dtype that it has.

    A tensor is looked up in `tensors` once, so that a mapping may read it from a file then.
    Names without the family's prefix (`h.0...` for `transformer.h.0...`) are understood.

    Raises:
        AssayError: if a tensor is missing, unexpected, not of floats, not finite, or of another
            shape; or if a tied head is there and is not the embedding.
    """
    family = known_family(family or family_of(spec))
    wanted = layout(spec, family)
    where = _locate(tensors, wanted, TABLES[family].prefix, spec)
    counts = Counter(name for tensor in wanted for name in tensor.ours)
    stacks: dict[str, list[np.ndarray]] = {}
    for tensor in wanted:
        array = np.asarray(tensors[where[tensor.name]])
        _check_values(tensor.name, array)
        _check_shape(tensor.name, array.shape, tensor.shape)
        tied = tensor.ours == ("embedding.table",) and HEAD in where and spec.head.tied
        if tied and not np.array_equal(array, np.asarray(tensors[HEAD])):
            raise AssayError(
                f"{HEAD}: differs from {tensor.name}, though tie_word_embeddings says they are one."
            )
        held = zip(tensor.ours, tensor.to_ours(array), strict=True)
        if tensor.expert is None:
            yield from held
            continue
        for name, one in held:  # a layer's experts follow one another: one array at a time
            stacks.setdefault(name, []).append(one)
            if len(stacks[name]) == counts[name]:
                yield name, np.stack(stacks.pop(name))


def to_huggingface(
    named: Mapping[str, Array], spec: TransformerSpec, family: str | None = None
) -> dict[str, np.ndarray]:
    """A state dict of theirs, of our named parameters (or of gradients named alike).

    Raises:
        AssayError: if no family can express the architecture, or a parameter is missing,
            unknown, or has another shape.
    """
    state = dict(iterate_theirs(named, spec, family))
    known = {name for tensor in layout(spec, family) for name in tensor.ours}
    _refuse_names(named.keys() - known, "unknown parameter")
    return state


def from_huggingface(
    tensors: Mapping[str, np.ndarray],
    architecture: TransformerSpec | Mapping[str, Any],
    family: str | None = None,
) -> dict[str, Array]:
    """Our named parameters, float32, of a state dict of theirs.

    `architecture` is a spec, or the dict of a config.json.

    Raises:
        AssayError: as `iterate_ours` does.
    """
    spec = architecture
    if not isinstance(spec, TransformerSpec):
        family = family or model_type(architecture)
        spec = spec_from_config(architecture)
    return {  # astype copies always: JAX on a CPU could otherwise share the source's memory
        name: jnp.asarray(array.astype(np.float32))
        for name, array in iterate_ours(tensors, spec, family)
    }


def _locate(
    tensors: Mapping[str, Any], wanted: Sequence[Tensor], prefix: str, spec: TransformerSpec
) -> dict[str, str]:
    """Our table's name of every tensor (and of a tied head) -> its name in this checkpoint."""
    where, missing = {}, []
    for name in [tensor.name for tensor in wanted]:
        short = name.removeprefix(prefix)
        found = name if name in tensors else short if short in tensors else None
        if found is None:
            missing.append(name)
        else:
            where[name] = found
    _refuse_names(missing, "this tensor is missing from the checkpoint")
    if spec.head is not None and spec.head.tied and HEAD in tensors:
        where[HEAD] = HEAD
    unexpected = [name for name in tensors if not BUFFERS.search(name)]
    _refuse_names(set(unexpected) - set(where.values()), "this tensor has no place in the model")
    return where


def _refuse_names(names: Sequence[str] | set[str], complaint: str) -> None:
    if names:
        first, *rest = sorted(names)
        more = f" (and {len(rest)} more: {', '.join(rest[:4])}, ...)" if rest else ""
        raise AssayError(f"{first}: {complaint}{more}.")


def _check_shape(name: str, found: Shape, wanted: Shape) -> None:
    if tuple(found) != tuple(wanted):
        raise AssayError(
            f"{name}: found shape {tuple(found)}, but the architecture has {tuple(wanted)}."
        )


def _check_values(name: str, array: np.ndarray) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise AssayError(f"{name}: found {array.dtype}; quantised weights are not supported.")
    if not np.isfinite(array).all():
        raise AssayError(f"{name}: holds values that are not finite.")


# ---------------------------------------------------------------------------- folders


class SafetensorsFolder(Mapping):
    """The tensors of a folder, sharded or not, each read from its file when it is asked for."""

    def __init__(self, path: str | Path):
        path = Path(path)
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        if index.is_file():
            shards = _read_json(index).get("weight_map", {})
            self._files = {name: path / Path(shard).name for name, shard in shards.items()}
        elif single.is_file():
            with _open(single) as file:
                self._files = dict.fromkeys(file.keys(), single)
        elif (path / "pytorch_model.bin").is_file():
            raise AssayError(
                f"{path}: holds only a pickle (pytorch_model.bin), which could run code; "
                f"convert it to safetensors first."
            )
        else:
            raise AssayError(f"{path}: there is no model.safetensors in this folder.")

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._files[name]
        with _open(path) as file:
            try:
                return file.get_tensor(name)
            except SafetensorError as error:
                raise AssayError(f"{path}: {name} cannot be read ({error}).") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def load_folder(path: str | Path) -> tuple[TransformerSpec, dict[str, Array]]:
    """The architecture and the named parameters, float32, of a folder of theirs.

    Raises:
        AssayError: if a file is missing or damaged, or the model is not supported.
    """
    config_path = Path(path) / "config.json"
    if not config_path.is_file():
        raise AssayError(f"{path}: there is no config.json in this folder.")
    config = _read_json(config_path)
    spec = spec_from_config(config)
    return spec, from_huggingface(SafetensorsFolder(path), spec, model_type(config))


def save_folder(
    path: str | Path,
    named: Mapping[str, Array],
    spec: TransformerSpec,
    family: str | None = None,
    *,
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes config.json and safetensors, in float32; all of it or nothing.

    Raises:
        AssayError: if `path` exists, or no family can express the architecture.
    """
    path = Path(path)
    if path.exists():
        raise AssayError(f"{path}: already exists; nothing was written.")
    family = known_family(family or family_of(spec))
    config = config_from_spec(spec, family) | {"dtype": "float32"}
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _save_shards(unfinished, named, spec, family, shard_bytes)
        os.rename(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _save_shards(path: Path, named, spec, family: str, shard_bytes: int) -> None:
    """Fills one file after the other, so that no more than one is held in memory."""
    shards: list[list[str]] = [[]]
    size = 0
    for tensor in layout(spec, family):
        nbytes = 4 * int(np.prod(tensor.shape))
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor.name)
        size += nbytes
    count = len(shards)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        files = ["model.safetensors"]
    stream, total = iterate_theirs(named, spec, family), 0
    for file, names in zip(files, shards, strict=True):
        tensors = {
            name: array.astype(np.float32) for name, (_, array) in zip(names, stream, strict=False)
        }
        total += sum(array.nbytes for array in tensors.values())
        save_file(tensors, path / file, metadata={"format": "pt"})
    if count > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (path / "model.safetensors.index.json").write_text(text)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise AssayError(f"{path}: is not JSON ({error}).") from None
    if not isinstance(data, dict):
        raise AssayError(f"{path}: holds no JSON object.")
    return data


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise AssayError(f"{path}: cannot be read as safetensors ({error}).") from None
