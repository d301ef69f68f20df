"""Checkpoints from one form to another: Hugging Face folders, GGUF files, runs, model folders.

A source gives its tensors one by one, a destination is written beside its place, verified there,
and renamed at the end. A **model folder** is this project's own form: `assay_model.json` (the
spec, and what the source said of tokens and generation), safetensors under our names, and the
tokenizer's files. Every command takes one as MODEL.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from assay.data import tokenizers
from assay.data.tokenizers import Tokenizer
from assay.errors import AssayError, did_you_mean
from assay.interop import reference
from assay.interop.huggingface import (
    checked_names,
    layout,
    new_folder,
    our_entries,
    read_config,
    their_entries,
    widened,
)
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
    check_dtype,
    dtype_of,
    read_json,
    shape_of,
    write_safetensors,
)
from assay.model.mup import folded
from assay.model.sharding import RULES, parameter_shardings, use_mesh
from assay.model.transformer import (
    abstract,
    from_named_parameters,
    name_leaves,
    named_parameters,
)
from assay.model.transformer import layout as kept_layout
from assay.spec.model import TransformerSpec
from assay.spec.run import ComputeSpec

Form = Literal["hf", "assay"]
FORMS = ("hf", "assay")
MODEL_FILE = "assay_model.json"
VERSION = 1

COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
    *("generation_config.json", tokenizers.FILE),
)
"""Files beside the weights that are kept as they are."""

TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1687 Newton wrote: every body attracts every "
    "other; def f(x): return x ** 2  # naïve, but it works\n\n"
)
TOKENS = 64
TOLERANCE = 1e-4
"""Of the largest logit (or of 1, where all are smaller): what float32 may differ by."""

# ---------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """What is converted. `tensors` are under their names if `theirs`, else under ours.

    `family` and `config` are there where the source is or was Hugging Face's; `files` are the
    tokenizer's and the generation's, by name. `narrower` are the dtypes of those tensors of theirs
    (experts, where they differ) that lie in a wider array here.
    """

    path: Path
    kind: str
    spec: TransformerSpec
    tensors: Mapping[str, Any]
    theirs: bool
    family: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    narrower: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        check_tokenizer(self.path, self.tokenizer, self.spec)

    @property
    def start_token(self) -> int | None:
        """The id that a target begins with, where the source names one."""
        found = [i for i in self._named("decoder_start_token_id") if isinstance(i, int)]
        return found[0] if found else None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end a text, one or several, where the source names them."""
        for found in self._named("eos_token_id"):
            ids = found if isinstance(found, list) else [found]
            return tuple(i for i in ids if isinstance(i, int) and 0 <= i < self.spec.vocab_size)
        return ()

    def _named(self, role: str) -> list[Any]:
        """What the configuration of generation, and after it the model's, say of a role."""
        name = "generation_config.json"
        try:
            generation = json.loads(self.files.get(name, b"{}"))
        except ValueError as error:
            raise AssayError(f"{self.path / name}: is not JSON ({error}).") from None
        configs = [generation if isinstance(generation, dict) else {}, self.config]
        return [config[role] for config in configs if config.get(role) is not None]

    def entries(self, form: Form, spec: TransformerSpec, family: str | None, dtype: str | None):
        """The tensors of a destination of this form, to be read from here one by one."""
        if form == "assay":
            if self.theirs:
                return our_entries(self.tensors, spec, self.family, dtype)
            return _same(self.tensors, _shapes_of(self.spec), _shapes_of(spec), dtype)
        if not self.theirs:
            kept = self.narrower if family == self.family else None
            return their_entries(self.tensors, spec, family, dtype, kept)
        where = checked_names(self.tensors, spec, family)
        shapes = {tensor.name: tensor.shape for tensor in layout(spec, family)}
        return _same(_Renamed(self.tensors, where), shapes, shapes, dtype)


class _Renamed(Mapping):
    """A checkpoint's tensors under other names."""

    def __init__(self, tensors: Mapping[str, Any], names: Mapping[str, str]):
        self._tensors, self._names = tensors, names

    def peek(self, name: str):
        found = self._names[name]
        return dtype_of(self._tensors, found), shape_of(self._tensors, found)

    def __getitem__(self, name: str):
        return self._tensors[self._names[name]]

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _same(
    tensors: Mapping[str, Any],
    own: Mapping[str, tuple],
    shapes: Mapping[str, tuple],
    dtype: str | None,
) -> list[Entry]:
    """Entries copied as they are. `own` are the shapes there, `shapes` those that are wanted:
    a table may gain rows that pad it, or lose them.

    Raises:
        AssayError: if a tensor is missing, unknown, or of another shape.
    """
    entries = []
    for name in tensors:
        if name not in shapes:
            raise AssayError(f"{name}: unknown parameter; {did_you_mean(name, shapes)}")
    for name, shape in shapes.items():
        if name not in tensors:
            raise AssayError(f"{name}: this parameter is missing.")
        found, kept = shape_of(tensors, name), dtype_of(tensors, name)
        check_dtype(name, kept)
        if found != own[name]:
            raise AssayError(f"{name}: found shape {found}, but the architecture has {own[name]}.")

        def arrays(name=name, shape=shape):
            return [np.asarray(tensors[name])[tuple(map(slice, shape))]]

        entries.append(Entry(name, np.dtype(dtype or kept), shape, arrays, name))
    return entries


def _shapes_of(spec: TransformerSpec) -> dict[str, tuple]:
    return {name: tuple(leaf.shape) for name, leaf in named_parameters(abstract(spec)).items()}


def check_tokenizer(path: Path, tokenizer: Tokenizer | None, spec: TransformerSpec) -> None:
    """
    Raises:
        AssayError: if the tokenizer has more tokens than the model's vocabulary.
    """
    if tokenizer is not None and tokenizer.vocab_size > spec.vocab_size:
        raise AssayError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary "
            f"is {spec.vocab_size}."
        )


def open_huggingface(path: Path) -> Source:
    """
    Raises:
        AssayError: if a file is missing or damaged, or the model is not supported.
    """
    config = read_config(path)
    spec, family = spec_from_config(config), model_type(config)
    tensors = SafetensorsFolder(path)
    return Source(
        path, "huggingface", spec, tensors, True, family, config, _files(path), _tokenizer(path)
    )


def open_gguf(path: Path) -> Source:
    """
    Raises:
        AssayError: if the file is damaged, or the model is not supported.
    """
    from assay.interop.gguf import GgufFile

    file = GgufFile(path)
    config, tokenizer = file.config(), file.tokenizer()
    files = {} if tokenizer is None else _tokenizer_files(tokenizer)
    return Source(path, "gguf", file.spec, file, True, file.family, config, files, tokenizer)


def open_model_folder(path: Path) -> Source:
    """
    Raises:
        AssayError: if a file is missing or damaged.
    """
    about = read_model_file(path)
    return Source(
        path,
        "assay",
        TransformerSpec.from_data(about["spec"]),
        SafetensorsFolder(path),
        False,
        about.get("family"),
        about.get("config") or {},
        _files(path),
        _tokenizer(path),
        about.get("narrower") or {},
    )


def open_run(
    path: Path, spec: TransformerSpec, named: Mapping[str, Any], tokenizer: Tokenizer
) -> Source:
    """A run's newest checkpoint, read by whoever knows runs."""
    host = {name: np.asarray(array) for name, array in named.items()}
    return Source(
        path, "run", spec, host, False, files=_tokenizer_files(tokenizer), tokenizer=tokenizer
    )


def read_model_file(path: Path) -> dict[str, Any]:
    """
    Raises:
        AssayError: if there is no assay_model.json, or it is of another version.
    """
    about = read_json(path / MODEL_FILE)
    if about.get("version") != VERSION or "spec" not in about:
        raise AssayError(
            f"{path / MODEL_FILE}: version is {about.get('version')!r}, expected {VERSION}."
        )
    return about


def _files(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in COMPANIONS if (path / name).is_file()}


def _tokenizer(path: Path) -> Tokenizer | None:
    there = any((path / name).is_file() for name in ("tokenizer.json", tokenizers.FILE))
    return tokenizers.load(path) if there else None


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    files = tokenizers.huggingface_files(tokenizer) | tokenizer.to_files()
    return {name: content.encode() for name, content in files.items()}


# ---------------------------------------------------------------------------- converting


@dataclass(frozen=True)
class Conversion:
    """What was done. `max_logit_difference` is None where nothing was compared; `note` says why."""

    source: str
    destination: str
    format: str
    params: int
    max_logit_difference: float | None
    tolerance: float | None
    dtype: dict[str, int]
    files: list[str]
    note: str | None


def convert(
    source: Source,
    destination: str | Path,
    *,
    to: str,
    verify: bool | None = None,
    dtype: str | None = None,
    family: str | None = None,
    vocab_multiple: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conversion:
    """Writes `source` as a new folder; all of it, or nothing.

    `to` is "hf" or "assay". `dtype` casts every weight; left out, each keeps its own.
    `verify` compares logits with the source's own implementation (None: where that can be done).
    `vocab_multiple` pads the tables of a model folder (50257 tokens in 50304 rows by 64).
    With a `mesh`, the parameters that are verified are read shard by shard onto its devices.
    `progress` is told the bytes done, of how many.

    Raises:
        AssayError: if the destination exists, the source is no good, no family can express the
            architecture, or the logits differ by more than float32 rounds.
    """
    if to not in FORMS:
        raise AssayError(f"--to {to}: {did_you_mean(to, FORMS)}")
    if dtype not in (None, "float32", "bfloat16"):
        raise AssayError(f"--dtype {dtype}: {did_you_mean(dtype, ['float32', 'bfloat16'])}")
    spec = source.spec
    if vocab_multiple is not None:
        if to == "hf":
            raise AssayError("--vocab-multiple: a Hugging Face folder has no rows that only pad.")
        spec = spec.replace(vocab_multiple=vocab_multiple)
    if family is not None and to != "hf":
        raise AssayError(f"--family {family}: a model folder is of none; it goes with --to hf.")
    written = source
    if to == "hf":
        written = _without_mup(source)
        spec = written.spec
        family = known_family(family or source.family or family_of(spec))
        config = config_from_spec(spec, family)  # refuses what the family cannot say
    note = None if verify is False else reference.missing(source.kind, to)
    if verify and note:
        raise AssayError(f"--verify: {note}")
    with new_folder(destination) as folder:
        entries = written.entries(to, spec, family, dtype)
        total, done = sum(entry.nbytes for entry in entries), 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        kept = Counter()
        for entry in entries:
            kept[entry.dtype.name] += int(np.prod(entry.shape))
        _write_companions(folder, source)
        if to == "hf":
            _write_config(folder, source, config, kept.most_common(1)[0][0])
        else:
            _write_model_file(folder, source, spec, dtype)
        write_safetensors(folder, entries, shard_bytes=shard_bytes, progress=tell)
        difference = tolerance = None
        if verify is not False and note is None:
            difference, tolerance = _verify(source, folder, to, dtype, mesh)
        elif verify is False:
            note = "not asked for (--no-verify)"
        if to == "hf":
            card = _model_card(source, spec, Path(destination).name, difference, note)
            (folder / "README.md").write_text(card)
        files = sorted(path.name for path in folder.iterdir())
    return Conversion(
        str(source.path),
        str(destination),
        to,
        sum(int(np.prod(shape)) for shape in _shapes_of(spec.replace(vocab_multiple=1)).values()),
        difference,
        tolerance,
        dict(kept),
        files,
        note,
    )


def _without_mup(source: Source) -> Source:
    """The source with muP's multipliers in its weights: no other format knows them.

    Raises:
        AssayError: if a multiplier has no weights to go into.
    """
    if source.spec.mup is None:
        return source
    named = {name: np.asarray(source.tensors[name]) for name in source.tensors}
    spec, weights = folded(source.spec, named)
    return replace(source, spec=spec, tensors=weights)


def _write_companions(folder: Path, source: Source) -> None:
    for name, content in source.files.items():
        (folder / name).write_bytes(content)


def _token_ids(source: Source) -> dict[str, int | list[int]]:
    """What starts, ends and pads a text, as the source's config or its tokenizer says."""
    roles = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    said = {role: source.config[role] for role in roles if source.config.get(role) is not None}
    if source.tokenizer is None or source.config:
        return said
    made = {"bos_token_id": source.tokenizer.bos_id, "eos_token_id": source.tokenizer.eos_id}
    return {role: i for role, i in made.items() if i is not None}


def _write_config(folder: Path, source: Source, config: dict[str, Any], dtype: str) -> None:
    ids = _token_ids(source)
    _write_json(folder / "config.json", config | ids | {"dtype": dtype})
    if "generation_config.json" not in source.files:
        _write_json(folder / "generation_config.json", ids)


def _write_model_file(
    folder: Path, source: Source, spec: TransformerSpec, dtype: str | None
) -> None:
    narrower = source.narrower
    if source.theirs:
        narrower = widened(source.tensors, source.spec, source.family)
    about = {
        "version": VERSION,
        "spec": spec.model_dump(mode="json"),
        "family": source.family,
        "config": source.config,
    }
    if narrower and dtype is None:
        about["narrower"] = narrower
    _write_json(folder / MODEL_FILE, about)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_card(
    source: Source, spec: TransformerSpec, name: str, difference: float | None, note: str | None
) -> str:
    count = sum(int(np.prod(shape)) for shape in _shapes_of(spec).values())
    pairs = getattr(spec, "encoder", None) is not None
    form = "AutoModelForSeq2SeqLM" if pairs else "AutoModelForCausalLM"
    task = "text2text-generation" if pairs else "text-generation"
    if difference is None:
        proof = f"The logits were not compared with the source's: {note}."
    else:
        proof = (
            f"On a text of {TOKENS} tokens the logits differ from the source's own "
            f"implementation's by at most {difference:.2g}."
        )
    return f"""---
library_name: transformers
pipeline_tag: {task}
---

# {name}

{count:,} parameters, a context of {spec.context:,} tokens, a vocabulary of {spec.vocab_size:,}.
Converted by Assay from `{source.path.name}`. {proof}

```python
from transformers import {form}, AutoTokenizer

model = {form}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""


# ---------------------------------------------------------------------------- verifying


def _verify(
    source: Source, folder: Path, to: Form, dtype: str | None, mesh: jax.sharding.Mesh | None
) -> tuple[float, float]:
    """The largest difference of logits between the source's implementation and the result's.

    Raises:
        AssayError: if it is over the tolerance.
    """
    tokens = _tokens(source)
    if source.theirs:
        wanted = reference.logits(source.path, source.kind, tokens, dtype)
    else:
        shapes = _shapes_of(source.spec)
        entries = _same(source.tensors, shapes, shapes, dtype)
        wanted = _our_logits(source.spec, entries, tokens, mesh)
    if to == "hf":
        found = reference.logits(folder, "huggingface", tokens, None)
    else:
        result = open_model_folder(folder)
        entries = result.entries("assay", result.spec, None, None)
        found = _our_logits(result.spec, entries, tokens, mesh)
    difference = float(np.abs(found - wanted).max())
    tolerance = TOLERANCE * max(1.0, float(np.abs(wanted).max()))
    if not difference <= tolerance:
        raise AssayError(
            f"{source.path}: the converted model's logits differ from the source's by "
            f"{difference:.3g}, over the tolerance of {tolerance:.3g}; nothing was written."
        )
    return difference, tolerance


def _tokens(source: Source) -> np.ndarray:
    """A text's first tokens, int32 [1, tokens]; without a tokenizer, drawn from the vocabulary."""
    length = min(TOKENS, source.spec.context)
    ids = np.zeros(0, np.int32)
    if source.tokenizer is not None and source.tokenizer.kind != "ids":
        ids = source.tokenizer.encode(TEXT * 8)[:length]
    if len(ids) < length:
        ids = np.random.default_rng(0).integers(0, source.spec.vocab_size, length, np.int32)
    return ids[None]


def _our_logits(
    spec: TransformerSpec,
    entries: Sequence[Entry],
    tokens: np.ndarray,
    mesh: jax.sharding.Mesh | None,
) -> np.ndarray:
    model = from_named_parameters(spec, place(entries, spec, mesh))
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"])
    rows = np.repeat(tokens, ways, axis=0)  # one for each device along the batch

    def forward(model, rows):
        both = {"source": rows} if getattr(spec, "encoder", None) is not None else {}
        return model(rows, **both)

    with use_mesh(mesh):
        return np.asarray(jax.jit(forward)(model, rows))[:1]


def place(
    entries: Sequence[Entry], spec: TransformerSpec, mesh: jax.sharding.Mesh | None = None
) -> dict[str, jax.Array]:
    """Our parameters in float32, each device's part read straight onto it.

    Raises:
        AssayError: if the mesh does not divide a parameter, or a value is not finite.
    """
    if mesh is None:
        return {
            entry.name: jnp.asarray(entry.read().astype(np.float32, copy=False))
            for entry in entries
        }
    places = places_of(spec, mesh)
    return {
        entry.name: jax.make_array_from_callback(
            entry.shape,
            places[entry.name],
            lambda index, entry=entry: entry.read(index).astype(np.float32, copy=False),
        )
        for entry in entries
    }


def places_of(spec: TransformerSpec, mesh: jax.sharding.Mesh) -> dict[str, jax.sharding.Sharding]:
    """Where each of our parameters, by its name, lies on a mesh.

    Raises:
        AssayError: if the mesh does not divide one.
    """
    compute = ComputeSpec()
    shardings = parameter_shardings(abstract(spec, compute), mesh)
    return name_leaves(shardings, kept_layout(spec, compute))
