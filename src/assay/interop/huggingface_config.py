"""Hugging Face's `config.json` and our spec: one pair of small functions a family.

What a family can express is what survives the way there and back, so that is the test: a spec
that returns changed is refused, with the first field that changed. Three things are let go, since
they are no part of what a trained model computes: how parameters begin (but for the standard
deviation, `initializer_range`), rows that only pad the vocabulary's tables, and experts' capacity
limits and z-loss.

Source: the configuration and modelling files of `transformers` 5; names and defaults are theirs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from assay.errors import AssayError, did_you_mean
from assay.spec.base import Spec
from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    EmbeddingSpec,
    FanInInit,
    HeadSpec,
    InitSpec,
    LayerNorm,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    MlpSpec,
    MoeSpec,
    NoPositions,
    NormalInit,
    QkNorm,
    RelativeBias,
    RmsNorm,
    Rope,
    StackSpec,
    TopK,
    TransformerSpec,
    YarnScaling,
)

Config = dict[str, Any]


@dataclass(frozen=True)
class ConfigFamily:
    """How one `model_type` writes an architecture. `write` may lose what `read` cannot restore.

    `defaults` are what `transformers` takes for a key that is not in the file.
    """

    architecture: str
    defaults: Config
    read: Callable[[Config], TransformerSpec]
    write: Callable[[TransformerSpec], Config]


def spec_from_config(config: Mapping[str, Any]) -> TransformerSpec:
    """The architecture that a `config.json` describes.

    Raises:
        AssayError: if its `model_type` is not known, or it asks for what a spec cannot say.
    """
    family = CONFIG_FAMILIES[model_type(config)]
    _refuse_if_set(config, "quantization_config")
    filled = family.defaults | dict(config)
    for name, value in filled.items():
        _check_kind(name, value, family.defaults.get(name))
    return family.read(filled)


KINDS = (
    (bool, "true or false"),
    (int, "a whole number of at least 1"),
    (float, "a number of at least 0"),
    (str, "a name"),
    (Mapping, "an object"),
    (list, "a list"),
)
"""What a value may be -> what a sentence calls it. `bool` first, since it is an `int` too."""
WHOLE = ("num_key_value_heads", "head_dim", "n_inner", "sliding_window", "num_decoder_layers")
NULLABLE = (*WHOLE, "attention_dropout", "router_jitter_noise", "router_aux_loss_coef")
OTHER_KINDS = dict.fromkeys(WHOLE, int) | {
    **dict.fromkeys(("num_local_experts", "num_experts", "max_window_layers"), int),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), Mapping),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor"), float),
    **dict.fromkeys(("layer_types", "mlp_only_layers"), list),
    "scale_decoder_outputs": bool,
}
"""Of keys that have no default, or null for one."""


def _check_kind(name: str, value: Any, default: Any) -> None:
    """
    Raises:
        AssayError: if the value is not of the kind that this key's have.
    """
    optional = default is None or name in NULLABLE
    kind = OTHER_KINDS.get(name)
    if kind is None and default is not None:
        kind = next(kind for kind, _ in KINDS if isinstance(default, kind))
    if kind is None or (value is None and optional):
        return
    is_bool, number = isinstance(value, bool), isinstance(value, (int, float))
    if kind is int:
        least = 0 if name == "max_window_layers" else 1
        right = isinstance(value, int) and not is_bool and value >= least
    elif kind is float:
        right = number and not is_bool and 0 <= value < math.inf
    else:
        right = isinstance(value, kind)
    if not right:
        raise AssayError(f"config.json: {name} is {value!r}; expected {dict(KINDS)[kind]}.")


def config_from_spec(spec: TransformerSpec, family: str | None = None) -> Config:
    """The `config.json` of an architecture, by the first family (or the one named) that can.

    Token ids (`bos_token_id`, ...) are the tokenizer's to say and are written as null.

    Raises:
        AssayError: if no family (or not that one) can express it; the field is named.
    """
    if family is None:
        family = family_of(spec)
    elif reason := _what_is_lost(spec, known_family(family)):
        raise AssayError(f"{reason}.")
    return _write(spec, family)


def model_type(config: Mapping[str, Any]) -> str:
    """The family of a config.

    Raises:
        AssayError: if it is not among those supported, which are named.
    """
    found = config.get("model_type")
    if not isinstance(found, str) or found not in CONFIG_FAMILIES:
        raise AssayError(f"config.json: model_type is {found!r}, not supported; {_supported()}")
    return found


def known_family(name: str) -> str:
    """The same name.

    Raises:
        AssayError: if no family has it; those supported are named.
    """
    if name not in CONFIG_FAMILIES:
        raise AssayError(f"'{name}' is no supported family; {_supported()}")
    return name


def family_of(spec: TransformerSpec) -> str:
    """The first family that can express this architecture.

    Raises:
        AssayError: if none can; the nearest is named, with the first field that it cannot express.
    """
    lost = {}
    for family in CONFIG_FAMILIES:
        if not (losses := _losses(spec, family)):
            return family
        lost[family] = losses
    nearest = min(lost, key=lambda family: _distance(lost[family]))
    more = len(lost[nearest]) - 1
    raise AssayError(
        f"no Hugging Face family can hold this architecture (of {', '.join(CONFIG_FAMILIES)}); the "
        f"nearest is '{nearest}': {lost[nearest][0].told(None)}"
        + (f", and {more} more field{'s differ' if more > 1 else ' differs'}." if more else ".")
    )


def _supported() -> str:
    return f"supported are: {', '.join(CONFIG_FAMILIES)}."


def _write(spec: TransformerSpec, family: str) -> Config:
    writer = CONFIG_FAMILIES[family]
    return {
        "architectures": [writer.architecture],
        "model_type": family,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.head is not None and spec.head.tied,
        "initializer_range": getattr(spec.init.weights, "std", 0.02),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
        **writer.write(spec),
    }


# ---------------------------------------------------------------------------- what is lost


def canonical(spec: TransformerSpec) -> TransformerSpec:
    """The same function written in the one way that reading a config gives.

    A default that was spelt out becomes the default, a pattern its shortest period; padding,
    initialisation, and experts' capacity and z-loss, which no config holds, become the defaults.
    """

    def stack(old: StackSpec) -> StackSpec:
        blocks = tuple(_canonical_block(block, spec.d_model) for block in old.blocks())
        return old.replace(pattern=shortest_period(blocks))

    return spec.replace(
        decoder=stack(spec.decoder),
        encoder=spec.encoder and stack(spec.encoder),
        vocab_multiple=1,
        init=InitSpec(),
    )


def shortest_period(entries: Sequence) -> tuple:
    """The shortest pattern that, repeated and cut off, gives these entries."""
    for period in range(1, len(entries)):
        if all(entry == entries[i % period] for i, entry in enumerate(entries)):
            return tuple(entries[:period])
    return tuple(entries)


def _canonical_block(block: BlockSpec, d_model: int) -> BlockSpec:
    feed_forward = block.feed_forward
    for part, attention in block.attentions().items():
        width = attention.width(d_model)
        changes: dict[str, Any] = {}
        if attention.kv_heads == attention.heads:
            changes["kv_heads"] = None
        if width * attention.heads == d_model:
            changes["head_dim"] = None
        if attention.scale is not None and math.isclose(attention.scale, width**-0.5):
            changes["scale"] = None
        scaling = getattr(attention.positions, "scaling", None)
        if scaling is not None and scaling.kind == "yarn" and scaling.attention_factor is not None:
            own = 0.1 * math.log(scaling.factor) + 1.0
            if math.isclose(scaling.attention_factor, own):
                scaling = scaling.replace(attention_factor=None)
                changes["positions"] = attention.positions.replace(scaling=scaling)
        block = block.replace(**{part: attention.replace(**changes)})
    if feed_forward is not None and feed_forward.kind == "mlp" and len(feed_forward.widths) == 1:
        block = block.replace(feed_forward=feed_forward.replace(hidden=feed_forward.widths[0]))
    if feed_forward is not None and feed_forward.kind == "moe":
        expert = feed_forward.expert
        if len(expert.widths) == 1:
            expert = expert.replace(hidden=expert.widths[0])
        block = block.replace(
            feed_forward=feed_forward.replace(expert=expert, capacity=None, z_loss=0.0)
        )
    return block


@dataclass(frozen=True)
class _Loss:
    """A field that does not come back from a family's config: what it is, and what it must be.

    `whole`: a part that the family does not have at all; `depth` parts before it were alike.
    """

    path: str
    found: str
    legal: str
    whole: bool = False
    depth: int = 0

    def told(self, family: str | None) -> str:
        whose = "" if family is None else f"which the family '{family}' cannot express; "
        return f"{self.path}: found {self.found}, {whose}legal is {self.legal}"


def _distance(losses: Sequence[_Loss]) -> tuple[bool, int, int]:
    """How far an architecture is from a family: a part that it lacks is further than any field."""
    return losses[0].whole, -losses[0].depth, len(losses)


def _what_is_lost(spec: TransformerSpec, family: str) -> str | None:
    """The first field that does not come back from this family's config, as a clause."""
    losses = _losses(spec, family)
    return losses[0].told(family) if losses else None


def _losses(spec: TransformerSpec, family: str) -> list[_Loss]:
    """All fields that do not come back; of parts that the family lacks, only the first."""
    whole = partial(_Loss, whole=True)
    takes = family in ENCODER_FAMILIES
    if (spec.encoder is not None) != takes:
        found, legal = ("none", "a stack") if takes else ("a stack", "none")
        return [whole("encoder", found, legal)]
    both = {"decoder": spec.decoder, "encoder": spec.encoder}
    stacks = {name: stack for name, stack in both.items() if stack is not None}
    for name, stack in stacks.items():
        if not stack.pattern:
            return [whole(f"{name}.num_layers", "0", "at least 1")]
    for name, i, block in ((n, i, b) for n, s in stacks.items() for i, b in enumerate(s.pattern)):
        path, part = f"{name}.pattern.{i}", block.feed_forward
        if block.attention is None:
            return [whole(f"{path}.attention", "none", "attention", depth=3 * i)]
        legal = "moe" if family in EXPERT_FAMILIES else "mlp"
        if part is None or part.kind != legal:
            found = "none" if part is None else part.kind
            return [whole(f"{path}.feed_forward", found, legal, depth=3 * i + 1)]
        if legal == "moe" and part.router.kind != "top_k":
            found, path = part.router.kind, f"{path}.feed_forward.router"
            return [whole(path, found, "top_k", depth=3 * i + 2)]
    heads = spec.decoder.pattern[0].attention.heads
    if family == "llama" and spec.d_model % heads:
        path = "decoder.pattern.0.attention.heads"
        return [_Loss(path, str(heads), f"a divisor of d_model ({spec.d_model})")]
    before = canonical(spec)
    after = canonical(spec_from_config(_write(spec, family)))
    layers = zip(before.decoder.blocks(), after.decoder.blocks(), strict=True)
    pairs = [
        (f"decoder.pattern.{i % len(spec.decoder.pattern)}", *pair) for i, pair in enumerate(layers)
    ]
    one = before.decoder.pattern[:1]
    pairs.append(
        (
            "",
            before.replace(decoder=before.decoder.replace(pattern=one)),
            after.replace(decoder=after.decoder.replace(pattern=one)),
        )
    )
    found = [loss for pair in pairs for loss in _differences(*pair)]
    first: dict[str, _Loss] = {}
    for loss in found:
        first.setdefault(loss.path, loss)
    return [*first.values()]


def _differences(path: str, a: Any, b: Any) -> Iterator[_Loss]:
    """The leaves at which two specs differ."""
    if isinstance(a, Spec) and type(a) is type(b):
        for name in type(a).model_fields:
            where = f"{path}.{name}".lstrip(".")
            yield from _differences(where, getattr(a, name), getattr(b, name))
    elif isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from _differences(f"{path}.{i}", *pair)
    elif a != b:
        yield _Loss(path, _in_words(a), _in_words(b))


def _in_words(value: Any) -> str:
    """A part by its kind, or as being set; a value as it is written."""
    if value is None:
        return "none"
    if isinstance(value, Spec):
        return getattr(value, "kind", "set")
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------- parts

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
}
"""Their activation -> ours; ours is written as the first that gives it."""


def _read_activation(c: Config, field: str) -> str:
    if c[field] not in ACTIVATIONS:
        raise AssayError(
            f"config.json: {field} is {c[field]!r}; {did_you_mean(c[field], ACTIVATIONS)}"
        )
    return ACTIVATIONS[c[field]]


def _write_activation(spec: MlpSpec) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == spec.activation)


def _refuse_if_set(c: Mapping[str, Any], *fields: str) -> None:
    for field in fields:
        if c.get(field):
            raise AssayError(f"config.json: {field} is set, which is not supported.")


def _read_init(c: Config) -> InitSpec:
    """Only the standard deviation is in a config; GPT-2's depth scaling is our default."""
    normal = NormalInit(std=c["initializer_range"])
    return InitSpec(weights=normal, embedding=normal)


ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")


def _read_rope(c: Config) -> Rope:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    found = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in found.values()):
        raise AssayError("config.json: rope_parameters differ by layer type, not supported.")
    if (found.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0) != 1.0:
        raise AssayError("config.json: partial_rotary_factor is not 1, which is not supported.")
    theta = found.get("rope_theta") or c.get("rope_theta") or 10_000.0
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind not in ROPE_SCALINGS:
        raise AssayError(
            f"config.json: rope_type is {kind!r}, not supported; "
            f"{did_you_mean(kind, ROPE_SCALINGS)}"
        )
    if kind == "default":
        return Rope(theta=theta)
    original = (
        c.get("original_max_position_embeddings")
        or found.get("original_max_position_embeddings")
        or c["max_position_embeddings"]
    )
    factor = found.get("factor")
    if factor is None and kind == "yarn":
        factor = c["max_position_embeddings"] / original
    if factor is None:
        raise AssayError(f"config.json: factor is missing beside rope_type '{kind}'.")
    if kind == "linear":
        return Rope(theta=theta, scaling=LinearScaling(factor=factor))
    if kind == "llama3":
        for field in ("low_freq_factor", "high_freq_factor"):
            if field not in found:
                raise AssayError(f"config.json: {field} is missing beside rope_type 'llama3'.")
        scaling = Llama3Scaling(
            factor=factor,
            low_freq_factor=found["low_freq_factor"],
            high_freq_factor=found["high_freq_factor"],
            original_context=original,
        )
        return Rope(theta=theta, scaling=scaling)
    if not found.get("truncate", True):
        raise AssayError("config.json: truncate is false for YaRN, which is not supported.")
    attention_factor = found.get("attention_factor")
    mscale, mscale_all = found.get("mscale"), found.get("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all:
        above, below = (0.1 * m * math.log(max(factor, 1)) + 1.0 for m in (mscale, mscale_all))
        attention_factor = above / below
    scaling = YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=found.get("beta_fast") or 32,
        beta_slow=found.get("beta_slow") or 1,
        attention_factor=attention_factor,
    )
    return Rope(theta=theta, scaling=scaling)


def _write_rope(rope: Rope) -> Config:
    """Written both ways, for readers of either."""
    scaling = rope.scaling
    if scaling is None:
        plain = {"rope_type": "default", "rope_theta": rope.theta}
        return {"rope_theta": rope.theta, "rope_scaling": None, "rope_parameters": plain}
    names = {"kind": "rope_type", "original_context": "original_max_position_embeddings"}
    fields = {
        names.get(name, name): value
        for name, value in scaling.model_dump().items()
        if value is not None
    }
    return {
        "rope_theta": rope.theta,
        "rope_scaling": fields,
        "rope_parameters": fields | {"rope_theta": rope.theta},
    }


# ---------------------------------------------------------------------------- GPT-2


def _read_gpt2(c: Config) -> TransformerSpec:
    _refuse_if_set(c, "scale_attn_by_inverse_layer_idx", "add_cross_attention")
    norm = LayerNorm(epsilon=c["layer_norm_epsilon"])
    block = BlockSpec(
        norm=norm,
        dropout=c["resid_pdrop"],
        attention=AttentionSpec(
            heads=c["n_head"],
            qkv_bias=True,
            out_bias=True,
            dropout=c["attn_pdrop"],
            scale=None if c["scale_attn_weights"] else 1.0,
        ),
        feed_forward=MlpSpec(
            hidden=c["n_inner"] or 4 * c["n_embd"],
            activation=_read_activation(c, "activation_function"),
            bias=True,
        ),
    )
    return TransformerSpec(
        vocab_size=c["vocab_size"],
        d_model=c["n_embd"],
        context=c["n_positions"],
        embedding=EmbeddingSpec(positions=LearnedPositions(), dropout=c["embd_pdrop"]),
        decoder=StackSpec(num_layers=c["n_layer"], pattern=(block,), final_norm=norm),
        head=HeadSpec(tied=c["tie_word_embeddings"]),
        init=_read_init(c),
    )


def _write_gpt2(spec: TransformerSpec) -> Config:
    block = spec.decoder.pattern[0]
    attention, feed_forward = block.attention, block.feed_forward
    hidden = feed_forward.widths[0]
    return {
        "n_positions": spec.context,
        "n_embd": spec.d_model,
        "n_layer": spec.decoder.num_layers,
        "n_head": attention.heads,
        "n_inner": None if hidden == 4 * spec.d_model else hidden,
        "activation_function": _write_activation(feed_forward),
        "layer_norm_epsilon": block.norm.epsilon,
        "embd_pdrop": spec.embedding.dropout,
        "attn_pdrop": attention.dropout,
        "resid_pdrop": block.dropout,
        "scale_attn_weights": attention.scale != 1.0,
    }


# ---------------------------------------------------------------------------- Llama and its line


def _llama_like(
    c: Config,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: Literal["head", "projection"] | None = None,
    windows: Sequence[int | None] = (None,),
    router: TopK | None = None,
) -> TransformerSpec:
    """The decoder that these families share; layer i has window `windows[i % len(windows)]`.

    With a `router`, its feed-forwards are experts.
    """
    norm = RmsNorm(epsilon=c["rms_norm_eps"])
    heads, width = c["num_attention_heads"], c["hidden_size"]
    head_dim, kv_heads = c.get("head_dim"), c["num_key_value_heads"]

    def block(window: int | None) -> BlockSpec:
        attention = AttentionSpec(
            heads=heads,
            kv_heads=None if kv_heads == heads else kv_heads,
            head_dim=None if head_dim is None or head_dim * heads == width else head_dim,
            positions=_read_rope(c),
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=QkNorm(norm=norm, over=qk_norm) if qk_norm else None,
            window=window,
            dropout=c["attention_dropout"] or 0.0,
        )
        feed_forward = MlpSpec(
            hidden=c["intermediate_size"],
            activation=_read_activation(c, "hidden_act"),
            gated=True,
            bias=mlp_bias,
        )
        if router is not None:
            feed_forward = MoeSpec(
                # transformers 5 reads both names, and writes the first
                experts=c.get("num_local_experts") or c["num_experts"],
                expert=feed_forward,
                router=router,
                balance_loss=c["router_aux_loss_coef"],
            )
        return BlockSpec(norm=norm, attention=attention, feed_forward=feed_forward)

    return TransformerSpec(
        vocab_size=c["vocab_size"],
        d_model=width,
        context=c["max_position_embeddings"],
        decoder=StackSpec(
            num_layers=c["num_hidden_layers"],
            pattern=tuple(block(window) for window in shortest_period(windows)),
            final_norm=norm,
        ),
        head=HeadSpec(tied=c["tie_word_embeddings"]),
        init=_read_init(c),
    )


def _write_llama_like(spec: TransformerSpec) -> Config:
    block = spec.decoder.pattern[0]
    attention, positions = block.attention, block.attention.positions
    feed_forward = block.feed_forward
    mlp = feed_forward.expert if feed_forward.kind == "moe" else feed_forward
    config = {
        "hidden_size": spec.d_model,
        "intermediate_size": mlp.widths[0],
        "num_hidden_layers": spec.decoder.num_layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.width(spec.d_model),
        "hidden_act": _write_activation(mlp),
        "max_position_embeddings": spec.context,
        "rms_norm_eps": block.norm.epsilon,
        "attention_dropout": attention.dropout,
    }
    return config | _write_rope(positions if positions.kind == "rope" else Rope())


def _read_llama(c: Config) -> TransformerSpec:
    bias = c["attention_bias"]
    return _llama_like(c, qkv_bias=bias, out_bias=bias, mlp_bias=c["mlp_bias"])


def _write_llama(spec: TransformerSpec) -> Config:
    block = spec.decoder.pattern[0]
    biases = {"attention_bias": block.attention.qkv_bias, "mlp_bias": block.feed_forward.bias}
    return _write_llama_like(spec) | biases | {"pretraining_tp": 1}


def _read_mistral(c: Config) -> TransformerSpec:
    return _llama_like(c, windows=(c["sliding_window"],))


def _write_mistral(spec: TransformerSpec) -> Config:
    window = spec.decoder.pattern[0].attention.window
    return _write_llama_like(spec) | {"sliding_window": window}


def _read_qwen2(c: Config) -> TransformerSpec:
    return _llama_like(c, qkv_bias=True, windows=_read_windows(c))


def _write_qwen2(spec: TransformerSpec) -> Config:
    return _write_llama_like(spec) | _write_windows(spec)


def _read_qwen3(c: Config) -> TransformerSpec:
    bias = c["attention_bias"]
    return _llama_like(c, qkv_bias=bias, out_bias=bias, qk_norm="head", windows=_read_windows(c))


def _write_qwen3(spec: TransformerSpec) -> Config:
    bias = spec.decoder.pattern[0].attention.qkv_bias
    return _write_llama_like(spec) | {"attention_bias": bias} | _write_windows(spec)


def _read_mixtral(c: Config) -> TransformerSpec:
    router = TopK(k=c["num_experts_per_tok"], jitter=c["router_jitter_noise"] or 0.0)
    return _llama_like(c, windows=(c["sliding_window"],), router=router)


def _write_mixtral(spec: TransformerSpec) -> Config:
    experts = spec.decoder.pattern[0].feed_forward
    return _write_mistral(spec) | {
        "num_local_experts": experts.experts,
        "num_experts_per_tok": experts.router.k,
        "router_jitter_noise": experts.router.jitter,
        "router_aux_loss_coef": experts.balance_loss,
    }


def _read_olmoe(c: Config) -> TransformerSpec:
    _refuse_if_set(c, "clip_qkv")
    bias, router = c["attention_bias"], _read_router(c)
    return _llama_like(c, qkv_bias=bias, out_bias=bias, qk_norm="projection", router=router)


def _write_olmoe(spec: TransformerSpec) -> Config:
    config = _write_llama_like(spec) | _write_router(spec)
    config.pop("head_dim")  # there it is always hidden_size / num_attention_heads
    bias = spec.decoder.pattern[0].attention.qkv_bias
    return config | {"attention_bias": bias, "clip_qkv": None}


def _read_qwen3_moe(c: Config) -> TransformerSpec:
    _refuse_if_set(c, "mlp_only_layers")
    if c["decoder_sparse_step"] != 1:
        raise AssayError("config.json: decoder_sparse_step must be 1; other layers are dense.")
    bias = c["attention_bias"]
    return _llama_like(
        {**c, "intermediate_size": c["moe_intermediate_size"]},
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        windows=(c["sliding_window"] if c["use_sliding_window"] else None,),
        router=_read_router(c),
    )


def _write_qwen3_moe(spec: TransformerSpec) -> Config:
    config = _write_llama_like(spec) | _write_router(spec)
    attention = spec.decoder.pattern[0].attention
    return config | {
        "moe_intermediate_size": config["intermediate_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": attention.qkv_bias,
        "use_sliding_window": attention.window is not None,
        "sliding_window": attention.window,
    }


# ---------------------------------------------------------------------------- T5


def _read_t5(c: Config) -> TransformerSpec:
    *gated, activation = c["feed_forward_proj"].split("-")
    if activation == "gelu" and gated:
        activation = "gelu_new"
    norm, rate = RmsNorm(epsilon=c["layer_norm_epsilon"]), c["dropout_rate"]
    positions = RelativeBias(
        buckets=c["relative_attention_num_buckets"],
        max_distance=c["relative_attention_max_distance"],
    )
    attention = AttentionSpec(
        heads=c["num_heads"], head_dim=c["d_kv"], scale=1.0, positions=positions, dropout=rate
    )
    block = BlockSpec(
        norm=norm,
        attention=attention,
        feed_forward=MlpSpec(
            hidden=c["d_ff"],
            activation=_read_activation({"feed_forward_proj": activation}, "feed_forward_proj"),
            gated=bool(gated),
        ),
        dropout=rate,
    )
    reading = block.replace(cross=attention.replace(positions=NoPositions()))
    # transformers 5.24 writes tie_word_embeddings as true always, and the truth beside it.
    tied = c.get("scale_decoder_outputs", c["tie_word_embeddings"])
    decoder_layers = c["num_decoder_layers"]
    return TransformerSpec(
        vocab_size=c["vocab_size"],
        d_model=c["d_model"],
        context=c["n_positions"],
        embedding=EmbeddingSpec(dropout=rate),
        encoder=StackSpec(
            num_layers=c["num_layers"], pattern=(block,), final_norm=norm, causal=False
        ),
        decoder=StackSpec(
            num_layers=c["num_layers"] if decoder_layers is None else decoder_layers,
            pattern=(reading,),
            final_norm=norm,
        ),
        head=HeadSpec(tied=tied, scale_by_inverse_sqrt_width=tied),
        init=InitSpec(
            weights=FanInInit(),
            queries=FanInInit(gain=c["d_kv"] ** -0.5),
            residual="same",
            embedding=NormalInit(std=1.0),
        ),
    )


def _write_t5(spec: TransformerSpec) -> Config:
    block = spec.encoder.pattern[0]
    attention, feed_forward = block.attention, block.feed_forward
    positions = attention.positions
    if positions.kind != "relative":
        positions = RelativeBias()
    activation = _write_activation(feed_forward)
    if feed_forward.gated:
        activation = "gated-" + ("gelu" if activation == "gelu_new" else activation)
    return {
        "d_model": spec.d_model,
        "d_kv": attention.width(spec.d_model),
        "d_ff": feed_forward.widths[0],
        "num_heads": attention.heads,
        "num_layers": spec.encoder.num_layers,
        "num_decoder_layers": spec.decoder.num_layers,
        "n_positions": spec.context,
        "relative_attention_num_buckets": positions.buckets,
        "relative_attention_max_distance": positions.max_distance,
        "dropout_rate": block.dropout,
        "layer_norm_epsilon": block.norm.epsilon,
        "feed_forward_proj": activation,
        "is_encoder_decoder": True,
    }


def _read_router(c: Config) -> TopK:
    return TopK(k=c["num_experts_per_tok"], renormalise=c["norm_topk_prob"])


def _write_router(spec: TransformerSpec) -> Config:
    experts = spec.decoder.pattern[0].feed_forward
    return {
        "num_experts": experts.experts,
        "num_experts_per_tok": experts.router.k,
        "norm_topk_prob": experts.router.renormalise,
        "router_aux_loss_coef": experts.balance_loss,
    }


def _read_windows(c: Config) -> list[int | None]:
    """Qwen's: layers of type sliding_attention, or else those from `max_window_layers` on."""
    window = c["sliding_window"] if c["use_sliding_window"] else None
    layers = c["num_hidden_layers"]
    types = c.get("layer_types")
    if types is None:
        first = layers if window is None else c["max_window_layers"]
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if len(types) != layers:
        raise AssayError(
            f"config.json: layer_types has {len(types)} entries, but num_hidden_layers is {layers}."
        )
    legal = {"full_attention": None, "attention": None, "sliding_attention": window}
    for kind in types:
        if kind not in legal:
            raise AssayError(f"config.json: layer_types has {kind!r}; {did_you_mean(kind, legal)}")
    if window is None and "sliding_attention" in types:
        raise AssayError(
            "config.json: layer_types asks for sliding_attention, but sliding_window is not set "
            "or use_sliding_window is false."
        )
    return [legal[kind] for kind in types]


def _write_windows(spec: TransformerSpec) -> Config:
    windows = [block.attention.window for block in spec.decoder.blocks()]
    sliding = [i for i, window in enumerate(windows) if window is not None]
    return {
        "use_sliding_window": bool(sliding),
        "sliding_window": windows[sliding[0]] if sliding else None,
        "max_window_layers": sliding[0] if sliding else len(windows),
        "layer_types": [
            "full_attention" if window is None else "sliding_attention" for window in windows
        ],
    }


# ---------------------------------------------------------------------------- the families

_SHARED = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_QWEN = _SHARED | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

CONFIG_FAMILIES = {
    "gpt2": ConfigFamily(
        "GPT2LMHeadModel",
        {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        },
        _read_gpt2,
        _write_gpt2,
    ),
    "llama": ConfigFamily(
        "LlamaForCausalLM",
        _SHARED
        | {
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        },
        _read_llama,
        _write_llama,
    ),
    "mistral": ConfigFamily(
        "MistralForCausalLM",
        _SHARED
        | {
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096 * 32,
            "sliding_window": 4096,
        },
        _read_mistral,
        _write_mistral,
    ),
    "qwen2": ConfigFamily("Qwen2ForCausalLM", _QWEN, _read_qwen2, _write_qwen2),
    "qwen3": ConfigFamily(
        "Qwen3ForCausalLM",
        _QWEN | {"head_dim": 128, "attention_bias": False},
        _read_qwen3,
        _write_qwen3,
    ),
    "mixtral": ConfigFamily(
        "MixtralForCausalLM",
        _SHARED
        | {
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096 * 32,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.0,
            "router_aux_loss_coef": 0.001,
        },
        _read_mixtral,
        _write_mixtral,
    ),
    "olmoe": ConfigFamily(
        "OlmoeForCausalLM",
        _SHARED
        | {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": None,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "clip_qkv": None,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.01,
        },
        _read_olmoe,
        _write_olmoe,
    ),
    "qwen3_moe": ConfigFamily(
        "Qwen3MoeForCausalLM",
        _QWEN
        | {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "attention_bias": False,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
        },
        _read_qwen3_moe,
        _write_qwen3_moe,
    ),
    "t5": ConfigFamily(
        "T5ForConditionalGeneration",
        {
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 6,
            "num_decoder_layers": None,
            "num_heads": 8,
            "n_positions": 512,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "dropout_rate": 0.1,
            "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "relu",
            "tie_word_embeddings": True,
        },
        _read_t5,
        _write_t5,
    ),
}
"""`model_type` -> how it is read and written; the order is that in which a spec is tried."""

EXPERT_FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
ENCODER_FAMILIES = ("t5",)
