"""GGUF files, read: llama.cpp's metadata becomes a config.json, its tensors their own names.

A file is read by the `gguf` package and its quantised tensors by `gguf.quants`, to float32; those
of floats keep their dtype. What llama.cpp's converter changes is undone here: its names, the
order of the rows of queries and keys where its rotary embedding turns neighbouring pairs, the
transposes of GPT-2, and experts in one array.

Sources: the `gguf` package and convert_hf_to_gguf.py of llama.cpp.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from assay.data.tokenizers import HuggingFaceTokenizer
from assay.data.vocabularies import from_gguf
from assay.errors import AssayError
from assay.interop.huggingface import layout, spec_from_config
from assay.interop.tensor_files import BLOCK_BYTES, Shape
from assay.spec.model import TransformerSpec

# ---------------------------------------------------------------------------- names

_ENDS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def _layers(names: Mapping[str, str]) -> dict[str, str]:
    return {f"model.layers.{{i}}.{theirs}": f"blk.{{i}}.{name}" for theirs, name in names.items()}


def _experts(block: str, gate: str, up: str, down: str) -> dict[str, str]:
    experts = {gate: "ffn_gate_exps", up: "ffn_up_exps", down: "ffn_down_exps"}
    return {f"{block}.gate": "ffn_gate_inp"} | {
        f"{block}.experts.{{e}}.{theirs}": name for theirs, name in experts.items()
    }


DENSE = _ENDS | _layers(_ATTENTION | _MLP)
MIXTRAL = _ENDS | _layers(_ATTENTION | _experts("block_sparse_moe", "w1", "w3", "w2"))
QWEN_MOE = _ENDS | _layers(_ATTENTION | _experts("mlp", "gate_proj", "up_proj", "down_proj"))
GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.h.{i}.ln_1": "blk.{i}.attn_norm",
    "transformer.h.{i}.attn.c_attn": "blk.{i}.attn_qkv",
    "transformer.h.{i}.attn.c_proj": "blk.{i}.attn_output",
    "transformer.h.{i}.ln_2": "blk.{i}.ffn_norm",
    "transformer.h.{i}.mlp.c_fc": "blk.{i}.ffn_up",
    "transformer.h.{i}.mlp.c_proj": "blk.{i}.ffn_down",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}


def _t5_stack(stack: str, short: str, parts: tuple[str, ...]) -> dict[str, str]:
    """An encoder's names or a decoder's: `parts` are llama.cpp's of its sublayers, in order."""
    modules = {"attn": "SelfAttention", "cross_attn": "EncDecAttention", "ffn": "DenseReluDense"}
    names = {f"{stack}.final_layer_norm": f"{short}.output_norm"}
    for n, part in enumerate(parts):
        theirs = f"{stack}.block.{{i}}.layer.{n}"
        ours, module = f"{short}.blk.{{i}}.{part}", f"{theirs}.{modules[part]}"
        names[f"{theirs}.layer_norm"] = f"{ours}_norm"
        if part == "ffn":
            linear = {"wi": "up", "wi_0": "gate", "wi_1": "up", "wo": "down"}
        else:
            linear = {x: x for x in "qkvo"} | {"relative_attention_bias": "rel_b"}
        names |= {f"{module}.{a}": f"{ours}_{b}" for a, b in linear.items()}
    return names


T5 = {
    "shared": "token_embd",
    "lm_head": "output",
    **_t5_stack("encoder", "enc", ("attn", "ffn")),
    **_t5_stack("decoder", "dec", ("attn", "cross_attn", "ffn")),
}
CONV1D = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")

NAMES = {
    "llama": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
    "mixtral": MIXTRAL,
    "olmoe": QWEN_MOE,
    "qwen3_moe": QWEN_MOE,
    "gpt2": GPT2,
    "t5": T5,
}
"""Hugging Face family -> its names of modules -> llama.cpp's; `{i}` a layer, `{e}` an expert."""

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "olmoe": "olmoe",
    "gpt2": "gpt2",
    "t5": "t5",
}
"""`general.architecture` -> family; a llama with experts is a Mixtral."""

UNREAD = ("rope_freqs.weight", "dec.blk.0.cross_attn_rel_b.weight")
"""Tensors that hold no parameter: Llama 3's scaling, which the config says, and T5's positions
between source and target, which nothing reads."""

NAMED = ("rope.scaling.type",)
NUMBERS = ("rope.freq_base", "rope.scaling.factor")
NUMBERS += ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")
FROM_0 = ("expert_count", "decoder_start_token_id", "expert_feed_forward_length")
LAYERED = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
"""Keys of metadata by what their values are; all others are whole numbers from 1 on."""

# ---------------------------------------------------------------------------- files


@dataclass(frozen=True)
class _Place:
    """Where one tensor of theirs is in the file, and what is to be undone."""

    name: str
    expert: int | None
    heads: int | None  # rows are permuted within each of so many heads
    transposed: bool


class GgufFile(Mapping):
    """A .gguf file as a checkpoint of theirs: config, tokenizer, and tensors by their names.

    A tensor is dequantised when it is asked for.

    Raises:
        AssayError: if the file is damaged, or of an architecture that is not supported.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._reader = _read(self.path)
        readers = {self.path: self._reader} | {part: _read(part) for part in self._other_parts()}
        files = [(path, tensor) for path, reader in readers.items() for tensor in reader.tensors]
        self._tensors = {tensor.name: tensor for _, tensor in files}
        self._files = {tensor.name: path for path, tensor in files}

    def _other_parts(self) -> list[Path]:
        """The other files of a model in several, of which the first is opened.

        Raises:
            AssayError: if it is not the first, or another is not there.
        """
        count = self.metadata.get("split.count", 1)
        if not isinstance(count, int) or count < 2:
            return []
        named = re.fullmatch(r"(.+)-00001-of-(\d{5})\.gguf", self.path.name)
        if named is None or int(named[2]) != count:
            raise AssayError(
                f"{self.path}: is one of {count} parts of a model; name the first, "
                f"NAME-00001-of-{count:05d}.gguf, with the others beside it."
            )
        parts = [
            self.path.with_name(f"{named[1]}-{i:05d}-of-{count:05d}.gguf")
            for i in range(2, count + 1)
        ]
        for part in parts:
            if not part.is_file():
                raise AssayError(f"{part}: is not there, but {self.path.name} is of {count} parts.")
        return parts

    @property
    def in_parts(self) -> bool:
        return self.metadata.get("split.count", 1) > 1

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """By name; of a float32 the shortest number that is it (1e-05, not 9.999999747e-06)."""
        found = {name: field.contents() for name, field in self._reader.fields.items()}
        return {
            name: float(str(np.float32(value))) if isinstance(value, float) else value
            for name, value in found.items()
        }

    def config(self) -> dict[str, Any]:
        """What the config.json of this model would say."""
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise AssayError(
                f"{self.path}: general.architecture is {architecture!r}, not supported; "
                f"supported are: {', '.join(ARCHITECTURES)}."
            )
        family = ARCHITECTURES[architecture]
        read = {"gpt2": _config_gpt2, "t5": _config_t5}.get(family, _config_llama_like)
        config = read(self, family, lambda key, *default: self._get(architecture, key, *default))
        roles = {"bos": "bos", "eos": "eos", "padding": "pad"}
        ids = {
            f"{theirs}_token_id": self.metadata.get(f"tokenizer.ggml.{role}_token_id")
            for role, theirs in roles.items()
        }
        return config | ids

    @cached_property
    def spec(self) -> TransformerSpec:
        config = self.config()
        try:
            return spec_from_config(config)
        except AssayError as error:
            raise AssayError(f"{self.path}: {error}") from None

    @property
    def family(self) -> str:
        return self.config()["model_type"]

    def tokenizer(self) -> HuggingFaceTokenizer | None:
        """The tokenizer in the file, with its chat template; None where it holds none."""
        if "tokenizer.ggml.tokens" not in self.metadata:
            return None
        try:
            return from_gguf(self.metadata)
        except AssayError as error:
            raise AssayError(f"{self.path}: {error}") from None

    def peek(self, name: str) -> tuple[np.dtype, Shape]:
        """dtype and shape, without the values."""
        place = self._places[name]
        tensor = self._tensors[place.name]
        shape = tuple(reversed(tensor.shape.tolist()))
        shape = shape[1:] if place.expert is not None else shape
        return _dtype(tensor), shape[::-1] if place.transposed else shape

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        array = self.as_it_lies(place.name, place.expert)
        if place.heads is not None:
            array = _unpermute(array, place.heads)
        return array.T if place.transposed else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @cached_property
    def _places(self) -> dict[str, _Place]:
        """Their names -> places; a tensor that has none keeps its own name, to be told of."""
        family, spec = self.family, self.spec
        permuted = family in ("llama", "mixtral")
        places = {}
        for theirs in layout(spec, family):
            i = next((part for part in theirs.name.split(".") if part.isdigit()), "")
            module, _, part = theirs.name.rpartition(".")
            template = module.replace(f".{i}.", ".{i}.", 1) if i else module
            if theirs.expert is not None:
                template = template.replace(f".experts.{theirs.expert}.", ".experts.{e}.")
            name, expert = f"{NAMES[family][template].format(i=i)}.{part}", theirs.expert
            if expert is not None and name not in self._tensors:  # files before April 2024
                name, expert = name.replace("_exps.", f".{expert}."), None
            if name not in self._tensors:
                continue
            heads = None
            if (permuted and ".attn_q." in name) or (permuted and ".attn_k." in name):
                attention = spec.decoder.blocks()[int(i)].attention
                heads = attention.heads if ".attn_q." in name else attention.num_kv_heads
            transposed = family == "gpt2" and name.endswith(CONV1D)
            places[theirs.name] = _Place(name, expert, heads, transposed)
        known = {place.name for place in places.values()} | set(UNREAD)
        if spec.head.tied:
            known.add("output.weight")
        return places | {
            name: _Place(name, None, None, False) for name in self._tensors if name not in known
        }

    def _get(self, architecture: str, key: str, *default: Any) -> Any:
        name = f"{architecture}.{key}"
        if name in self.metadata:
            return self._checked(name, key, self.metadata[name])
        if default:
            return default[0]
        raise AssayError(f"{self.path}: {name} is missing.")

    def _checked(self, name: str, key: str, value: Any) -> Any:
        """
        Raises:
            AssayError: if the value is not of its key's kind.
        """
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key in LAYERED and isinstance(value, list):
            return value  # refused by who knows of layers
        if key in NAMED:
            right, wanted = isinstance(value, str), "a name"
        elif key in NUMBERS:
            right, wanted = number and 0 < value < math.inf, "a number over 0"
        else:
            least = 0 if key in FROM_0 else 1
            right = number and isinstance(value, int) and value >= least
            wanted = f"a whole number of at least {least}"
        if not right:
            raise AssayError(f"{self.path}: {name} is {value!r}; expected {wanted}.")
        return value

    def has(self, name: str) -> bool:
        return name in self._tensors

    def as_it_lies(self, name: str, expert: int | None = None) -> np.ndarray:
        """A tensor (or one expert of it) by the file's own name, its values in the file's order."""
        data = self._data(name)
        return _dequantise(data if expert is None else data[expert], self._tensors[name])

    def _data(self, name: str) -> np.ndarray:
        """As the reader's `data`, but mapped anew: what is read does not stay in memory."""
        tensor = self._tensors[name]
        like = tensor.data
        if not like.size:
            return like
        mapped = np.memmap(self._files[name], like.dtype, "r", int(tensor.data_offset), like.shape)
        return mapped.view(np.ndarray)

    def rows(self, name: str) -> int:
        if name not in self._tensors:
            raise AssayError(f"{self.path}: the tensor {name} is missing.")
        return int(self._tensors[name].shape[-1])

    def head_is_embedding(self) -> bool:
        """Whether there is no head of its own, or it is the embedding's table again."""
        if "output.weight" not in self._tensors:
            return True
        head, table = self._tensors["output.weight"], self._tensors["token_embd.weight"]
        same = head.tensor_type == table.tensor_type and head.data.shape == table.data.shape
        return same and np.array_equal(self._data(head.name), self._data(table.name))


def _read(path: Path):
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """The package's, three times as fast: plain views of the file, not memmaps of memmaps."""

        def _get(self, *args, **options):
            if isinstance(self.data, np.memmap):
                self.data = self.data.view(np.ndarray)
            return super()._get(*args, **options)

    if not path.is_file():
        raise AssayError(f"{path}: there is no such file.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise AssayError(f"{path}: is not a GGUF file (it does not begin with 'GGUF').")
    try:
        return Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError) as error:
        raise AssayError(f"{path}: is damaged or cut short ({error}).") from None


def _dtype(tensor) -> np.dtype:
    import jax.numpy as jnp

    kept = {"F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}
    return np.dtype(kept.get(tensor.tensor_type.name, np.float32))


def _dequantise(data: np.ndarray, tensor) -> np.ndarray:
    """The values as they are where they are floats, else float32 as `gguf.quants` has them."""
    from gguf.quants import dequantize

    match tensor.tensor_type.name:
        case "F32" | "F16" | "F64":
            return data
        case "BF16":
            return data.view(_dtype(tensor))
    # Some rows at a time: the package keeps all that it made besides the result.
    rows = data.reshape(-1, data.shape[-1])
    step = max(1, BLOCK_BYTES // max(8 * rows.shape[-1], 1))  # 8: of 4 bits to 32
    out = None
    try:
        for start in range(0, len(rows), step):
            block = dequantize(rows[start : start + step], tensor.tensor_type)
            if out is None:
                out = np.empty((len(rows), block.shape[-1]), np.float32)
            out[start : start + step] = block
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise AssayError(f"{tensor.name}: is of type {kind}, which cannot be read.") from None
    return out.reshape(*data.shape[:-1], -1)


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows (head, pair, which) back to (head, which, pair), as the two halves of a head are."""
    pairs = len(array) // heads // 2
    return array.reshape(heads, pairs, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


# ---------------------------------------------------------------------------- configs


def _config_gpt2(file: GgufFile, family: str, get) -> dict[str, Any]:
    width = get("embedding_length")
    hidden = get("feed_forward_length")
    return {
        "model_type": family,
        "vocab_size": file.rows("token_embd.weight"),
        "n_positions": file.rows("position_embd.weight"),
        "n_embd": width,
        "n_layer": get("block_count"),
        "n_head": get("attention.head_count"),
        "n_inner": None if hidden == 4 * width else hidden,
        "layer_norm_epsilon": get("attention.layer_norm_epsilon"),
        "tie_word_embeddings": file.head_is_embedding(),
    }


def _config_t5(file: GgufFile, family: str, get) -> dict[str, Any]:
    layers = get("block_count")
    return {
        "model_type": family,
        "vocab_size": file.rows("token_embd.weight"),
        "d_model": get("embedding_length"),
        "d_kv": get("attention.key_length"),
        "d_ff": get("feed_forward_length"),
        "num_layers": layers,
        "num_decoder_layers": get("decoder_block_count", layers),
        "num_heads": get("attention.head_count"),
        "n_positions": get("context_length"),
        "relative_attention_num_buckets": get("attention.relative_buckets_count"),
        "layer_norm_epsilon": get(
            "attention.layer_norm_rms_epsilon", get("attention.layer_norm_epsilon", 1e-6)
        ),
        # llama.cpp's graph decides by this tensor too
        "feed_forward_proj": "gated-gelu" if file.has("enc.blk.0.ffn_gate.weight") else "relu",
        "tie_word_embeddings": file.head_is_embedding(),
        "decoder_start_token_id": get("decoder_start_token_id", 0),
    }


def _config_llama_like(file: GgufFile, family: str, get) -> dict[str, Any]:
    heads, width = get("attention.head_count"), get("embedding_length")
    kv_heads = get("attention.head_count_kv", heads)
    for part, by_layer in (
        ("heads", heads),
        ("heads", kv_heads),
        ("widths", get("feed_forward_length", 1)),
    ):
        if isinstance(by_layer, list):
            raise AssayError(f"{file.path}: {part} differ by layer, which is not supported.")
    head_dim = get("attention.key_length", width // heads)
    rotated = get("rope.dimension_count", head_dim)
    if rotated != head_dim or get("attention.value_length", head_dim) != head_dim:
        raise AssayError(
            f"{file.path}: heads of {head_dim} turn {rotated} of their values or have others of "
            f"another width, which is not supported."
        )
    config = {
        "model_type": family,
        "vocab_size": file.rows("token_embd.weight"),
        "hidden_size": width,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(file, get),
        "tie_word_embeddings": file.head_is_embedding(),
    }
    experts = get("expert_count", 0)
    if not experts:
        config["intermediate_size"] = get("feed_forward_length")
    else:
        config |= {
            "model_type": "mixtral" if family == "llama" else family,
            "num_local_experts": experts,
            "num_experts": experts,
            "num_experts_per_tok": get("expert_used_count"),
            "intermediate_size": get("expert_feed_forward_length", get("feed_forward_length", 0)),
        }
        config["moe_intermediate_size"] = config["intermediate_size"]
        # llama.cpp's graphs decide this by architecture
        config["norm_topk_prob"] = family == "qwen3_moe"
    if family in ("llama", "qwen3", "qwen3_moe", "olmoe"):
        config["attention_bias"] = file.has("blk.0.attn_q.bias")
    if family == "llama":
        config["mlp_bias"] = file.has("blk.0.ffn_up.bias")
    return config


def _rope_scaling(file: GgufFile, get) -> dict[str, Any] | None:
    if file.has("rope_freqs.weight"):
        return _llama3_scaling(file, get)
    kind = get("rope.scaling.type", "none")
    factor = get("rope.scaling.factor", None)
    if kind == "none" or factor is None:
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if (original := get("rope.scaling.original_context_length", None)) is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(file: GgufFile, get) -> dict[str, Any]:
    """llama.cpp keeps Llama 3's scaling as the factor that each frequency is divided by.

    Its `factor` is the largest of them; the others are Meta's, and must give these factors.
    """
    found = file._tensors["rope_freqs.weight"].data.astype(np.float64)
    factor, low, high, original = float(found.max()), 1.0, 4.0, 8192
    theta, dim = get("rope.freq_base", 10_000.0), 2 * len(found)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    wanted = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(found, wanted, rtol=1e-4):
        raise AssayError(f"{file.path}: rope_freqs.weight is not Llama 3's scaling.")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
