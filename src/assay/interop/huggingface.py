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
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from assay.errors import AssayError
from assay.interop.huggingface_config import (
    config_from_spec,
    family_of,
    known_family,
    model_type,
    spec_from_config,
)
from assay.interop.tensor_files import (
    SHARD_BYTES,
    Entry,
    SafetensorsFolder,
    Shape,
    check_dtype,
    dtype_of,
    read_json,
    shape_of,
    write_safetensors,
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
    "our_entries",
    "read_config",
    "save_folder",
    "spec_from_config",
    "their_entries",
    "to_huggingface",
]

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
    have a tensor for each, we one array with experts in its first axis. `gated` rows are for
    blocks whose feed-forward is (True) or is not (False).
    """

    ours: str | tuple[str, ...]
    theirs: str
    form: Form = SAME
    vocab: bool = False
    gated: bool | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclass(frozen=True)
class Table:
    """A family's rows. `prefix` is the part of their names that a bare model leaves out.

    `copies` are tensors that some files hold besides, each the embedding again.
    """

    prefix: str
    rows: tuple[Row, ...]
    copies: tuple[str, ...] = ()


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


def _t5_stack(ours: str, theirs: str, parts: Sequence[str]) -> tuple[Row, ...]:
    """An encoder's rows or a decoder's: `parts` are its sublayers, in their order."""
    names = {"attention": "SelfAttention", "cross": "EncDecAttention"}
    block, rows = f"{theirs}.block.{{i}}.layer", []
    layer = f"{ours}layers.{{i}}"
    for n, part in enumerate(parts):
        rows.append(Row(f"{layer}.{part}_norm.scale", f"{block}.{n}.layer_norm.weight"))
        if part in names:
            rows += [
                Row(f"{layer}.{part}.{x}.w", f"{block}.{n}.{names[part]}.{x}.weight", TRANSPOSED)
                for x in "qkvo"
            ]
            continue
        ff, dense = f"{layer}.feed_forward", f"{block}.{n}.DenseReluDense"
        rows += [
            Row(f"{ff}.up.0.w", f"{dense}.wi.weight", TRANSPOSED, gated=False),
            Row(f"{ff}.gate.w", f"{dense}.wi_0.weight", TRANSPOSED, gated=True),
            Row(f"{ff}.up.0.w", f"{dense}.wi_1.weight", TRANSPOSED, gated=True),
            Row(f"{ff}.down.w", f"{dense}.wo.weight", TRANSPOSED),
        ]
    table = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Row(f"{ours}relative_bias", table),
        Row(f"{ours}final_norm.scale", f"{theirs}.final_layer_norm.weight"),
        *rows,
    )


T5 = Table(
    "",
    (
        Row("embedding.table", "shared.weight", vocab=True),
        *_t5_stack("encoder.", "encoder", ("attention", "feed_forward")),
        *_t5_stack("", "decoder", ("attention", "cross", "feed_forward")),
        Row("head.w", "lm_head.weight", TRANSPOSED, vocab=True),
    ),
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
)

TABLES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "mixtral": MIXTRAL,
    "olmoe": QWEN3_MOE,
    "qwen3_moe": QWEN3_MOE,
    "t5": T5,
}
"""`model_type` -> its table."""

BUFFERS = re.compile(
    r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq|EncDecAttention\.relative_attention_bias\.weight)$"
)
"""Tensors of theirs that hold no parameter, in old files: causal masks, rotary frequencies, and
T5's relative positions between source and target, which nothing reads."""

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
        """Theirs, a view of ours where their form allows."""
        tensor = self.row.form.to_theirs(arrays)
        return tensor[: self.vocab_size] if self.row.vocab else tensor

    def to_ours(self, tensor: np.ndarray) -> Sequence[np.ndarray]:
        """Ours, views of theirs; of a vocabulary that is padded here, only the real rows."""
        return self.row.form.to_ours(tensor, self.our_shapes)


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
        if row.gated is not None:
            block = ours[0].split(".feed_forward.")[0]
            if row.gated != (f"{block}.feed_forward.gate.w" in shapes):
                return
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
    for stack in (spec.encoder, spec.decoder):
        for i in range(stack.num_layers if stack else 0):
            for row in rows:
                in_encoder = row.names[0].startswith("encoder.")
                if "{i}" in row.theirs and in_encoder == (stack is spec.encoder):
                    place(row, i)
    for name in shapes:
        if name not in placed:
            raise AssayError(f"{name}: the family '{family}' has no tensor for this parameter.")
    return tensors


def their_entries(
    named: Mapping[str, Array],
    spec: TransformerSpec,
    family: str | None = None,
    dtype: str | None = None,
    narrower: Mapping[str, str] | None = None,
) -> list[Entry]:
    """Their tensors, made of ours when they are read; in `dtype`, or each in its own.

    `narrower` names those that were widened when they became ours, and their own dtypes.

    Raises:
        AssayError: if a parameter is missing, or has another shape than the spec's.
    """
    entries = []
    for tensor in layout(spec, family):
        for name, shape in zip(tensor.ours, tensor.our_shapes, strict=True):
            if name not in named:
                raise AssayError(f"{name}: this parameter is missing.")
            found = shape_of(named, name)
            _check_shape(name, found if tensor.expert is None else found[1:], shape)
            check_dtype(name, dtype_of(named, name))

        def arrays(tensor=tensor):
            ours = [np.asarray(named[name]) for name in tensor.ours]
            if tensor.expert is not None:
                ours = [array[tensor.expert] for array in ours]
            return [tensor.to_theirs(ours)]

        own = (narrower or {}).get(tensor.name) or dtype_of(named, tensor.ours[0])
        kept = np.dtype(dtype or own)
        entries.append(Entry(tensor.name, kept, tensor.shape, arrays, tensor.ours[0]))
    return entries


def our_entries(
    tensors: Mapping[str, np.ndarray],
    spec: TransformerSpec,
    family: str | None = None,
    dtype: str | None = None,
) -> list[Entry]:
    """Our parameters, made of theirs when they are read; in `dtype`, or each in its own.

    Names without the family's prefix (`h.0...` for `transformer.h.0...`) are understood.

    Raises:
        AssayError: if a tensor is missing, unexpected, not of floats, or of another shape; if
            a tied head is there and is not the embedding.
    """
    family = known_family(family or family_of(spec))
    wanted = layout(spec, family)
    where = checked_names(tensors, spec, family)
    shapes = {name: leaf.shape for name, leaf in named_parameters(abstract(spec)).items()}
    holders: dict[str, list[tuple[Tensor, int]]] = {}
    for tensor in wanted:
        for k, name in enumerate(tensor.ours):
            holders.setdefault(name, []).append((tensor, k))
    entries = []
    for name, held in holders.items():
        own = _holding({dtype_of(tensors, where[tensor.name]) for tensor, _ in held})

        def arrays(held=held):
            parts = [(t, t.to_ours(np.asarray(tensors[where[t.name]]))[k]) for t, k in held]
            return [part if t.expert is None else part[None] for t, part in parts]

        kept = np.dtype(dtype or own)
        entries.append(Entry(name, kept, shapes[name], arrays, held[0][0].name))
    return entries


def _holding(dtypes: set[np.dtype]) -> np.dtype:
    """The one dtype, or (of experts of one layer, which are one array of ours) one that holds
    every value of all of them."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return max(np.dtype(np.float32), *dtypes, key=lambda dtype: dtype.itemsize)


def widened(
    tensors: Mapping[str, np.ndarray], spec: TransformerSpec, family: str
) -> dict[str, str]:
    """Their tensors that lie in a wider array of ours than their own dtype, and that dtype."""
    where = checked_names(tensors, spec, family)
    dtypes = {
        tensor: dtype_of(tensors, where[tensor.name])
        for tensor in layout(spec, family)
        if tensor.expert is not None
    }
    arrays: dict[tuple[str, ...], set[np.dtype]] = {}
    for tensor, dtype in dtypes.items():
        arrays.setdefault(tensor.ours, set()).add(dtype)
    return {
        tensor.name: dtype.name
        for tensor, dtype in dtypes.items()
        if dtype != _holding(arrays[tensor.ours])
    }


def checked_names(
    tensors: Mapping[str, np.ndarray], spec: TransformerSpec, family: str
) -> dict[str, str]:
    """Our table's name of every tensor -> its name in this checkpoint.

    Raises:
        AssayError: as `our_entries`.
    """
    wanted = layout(spec, family)
    copies = [name for name in TABLES[family].copies if name in tensors]
    where = _locate(tensors, wanted, TABLES[family].prefix, spec, copies)
    for tensor in wanted:
        check_dtype(tensor.name, dtype_of(tensors, where[tensor.name]))
        _check_shape(tensor.name, shape_of(tensors, where[tensor.name]), tensor.shape)
        if tensor.ours == ("embedding.table",):
            tied = [HEAD] if HEAD in where and spec.head.tied else []
            for copy in (*tied, *copies):
                if not np.array_equal(tensors[where[tensor.name]], tensors[copy]):
                    why = (
                        "tie_word_embeddings says they are one"
                        if copy == HEAD
                        else ("the family has one embedding")
                    )
                    raise AssayError(f"{copy}: differs from {tensor.name}, though {why}.")
    return where


def iterate_theirs(
    named: Mapping[str, Array], spec: TransformerSpec, family: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors one by one, made of ours; each keeps the dtype that it has.

    Raises:
        AssayError: as `their_entries`, or if a value is not finite.
    """
    for entry in their_entries(named, spec, family):
        yield entry.name, entry.read()


def iterate_ours(
    tensors: Mapping[str, np.ndarray], spec: TransformerSpec, family: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters one by one, made of theirs; each keeps the dtype that it has.

    Raises:
        AssayError: as `our_entries`, or if a value is not finite.
    """
    for entry in our_entries(tensors, spec, family):
        yield entry.name, entry.read()


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
    return {
        entry.name: jnp.asarray(entry.read())
        for entry in our_entries(tensors, spec, family, "float32")
    }


def _locate(
    tensors: Mapping[str, Any],
    wanted: Sequence[Tensor],
    prefix: str,
    spec: TransformerSpec,
    copies: Sequence[str] = (),
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
    placed = {*where.values(), *copies}
    _refuse_names(set(unexpected) - placed, "this tensor has no place in the model")
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


# ---------------------------------------------------------------------------- folders


def read_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a folder of theirs.

    Raises:
        AssayError: if there is none, or it is no JSON object.
    """
    config = Path(path) / "config.json"
    if not config.is_file():
        raise AssayError(f"{path}: there is no config.json in this folder.")
    return read_json(config)


def load_folder(path: str | Path) -> tuple[TransformerSpec, dict[str, Array]]:
    """The architecture and the named parameters, float32, of a folder of theirs.

    Raises:
        AssayError: if a file is missing or damaged, or the model is not supported.
    """
    config = read_config(path)
    spec = spec_from_config(config)
    return spec, from_huggingface(SafetensorsFolder(path), spec, model_type(config))


def save_folder(
    path: str | Path,
    named: Mapping[str, Array],
    spec: TransformerSpec,
    family: str | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and safetensors, in float32; all of it or nothing.

    Raises:
        AssayError: if `path` exists, or no family can express the architecture.
    """
    family = known_family(family or family_of(spec))
    config = config_from_spec(spec, family) | {"dtype": "float32"}
    with new_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        entries = their_entries(named, spec, family, "float32")
        write_safetensors(folder, entries, shard_bytes=shard_bytes)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside `path`, which takes its name where all went well, and else is removed,
    with the folders above it that were made for it.

    Raises:
        AssayError: if `path` exists, or no folder can be made there.
    """
    path = Path(path)
    if path.exists():
        raise AssayError(f"{path}: already exists; nothing was written.")
    above = [folder for folder in path.parents if not folder.exists()]  # the nearest first
    unfinished = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield unfinished
        unfinished.chmod(0o755)
        os.rename(unfinished, path)
    except BaseException as error:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        for folder in above:
            with suppress(OSError):  # another's file is in it, or it was never made
                folder.rmdir()
        if isinstance(error, OSError):
            why = error.strerror or error
            raise AssayError(f"{path}: cannot be written ({why}).") from None
        raise
