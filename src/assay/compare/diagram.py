"""An architecture as a few lines of text, from the embedding down to the logits."""

from collections.abc import Iterator
from itertools import groupby

from assay.spec.model import (
    AttentionSpec,
    BlockSpec,
    FeedForward,
    MlpSpec,
    StackSpec,
    TransformerSpec,
)


def diagram(spec: TransformerSpec) -> str:
    """The model in lines of at most 80 columns; equal layers that follow each other are one."""
    return "\n".join(_lines(spec))


def _lines(spec: TransformerSpec) -> Iterator[str]:
    embedding = spec.embedding
    notes = [f"{spec.padded_vocab} x {spec.d_model}"]
    if embedding.positions.kind != "none":
        notes.append(f"+ {embedding.positions.kind} positions")
    if embedding.ngrams is not None:
        notes.append(f"+ n-grams of {', '.join(map(str, embedding.ngrams.orders))} tokens")
    if embedding.scale_by_sqrt_width:
        notes.append("scaled by sqrt(d)")
    if embedding.norm is not None:
        notes.append(embedding.norm.kind)
    yield f"embedding      {', '.join(notes)}"
    yield from _stack(spec.decoder, spec.d_model)
    if spec.decoder.final_norm is not None:
        yield f"norm           {spec.decoder.final_norm.kind}"
    if spec.head is not None:
        tied = (
            "the embedding's table" if spec.head.tied else f"{spec.d_model} x {spec.padded_vocab}"
        )
        yield f"head           {tied}" + (", biased" if spec.head.bias else "")


def _stack(stack: StackSpec, width: int) -> Iterator[str]:
    period = len(stack.pattern)
    whole, rest = divmod(stack.num_layers, period or 1)
    for repeats, blocks in ((whole, stack.pattern), (min(rest, 1), stack.pattern[:rest])):
        if not repeats or not blocks:
            continue
        yield f"  {repeats} times" + ("" if stack.causal else ", every token sees every other")
        for block, same in groupby(blocks):
            count = len([*same])
            if count > 1:
                yield f"    {count} layers of"
            yield from _block(block, width)


def _block(block: BlockSpec, width: int) -> Iterator[str]:
    norm = block.norm.kind
    around = {
        "pre": "x + f({norm}(x))",
        "post": "{norm}(x + f(x))",
        "both": "x + {norm}(f({norm}(x)))",
    }[block.norm_position].format(norm=norm)
    parts = []
    if block.attention is not None:
        parts.append(("attention", _attention(block.attention, width)))
    if block.feed_forward is not None:
        parts.append(("feed-forward", _feed_forward(block.feed_forward)))
    for name, what in parts:
        yield f"    {name:<12} {what}"
    yield f"    {'each':<12} {around}"


def _attention(attention: AttentionSpec, width: int) -> str:
    heads, kv_heads = attention.heads, attention.num_kv_heads
    kind = {heads: "multi-head", 1: "multi-query"}.get(kv_heads, "grouped")
    notes = [f"{kind}: {heads} heads of {attention.width(width)}"]
    if kv_heads != heads:
        notes.append(f"{kv_heads} for keys and values")
    if attention.positions.kind != "none":
        notes.append(attention.positions.kind)
    if attention.window is not None:
        notes.append(f"window {attention.window}")
    if attention.qk_norm is not None:
        notes.append("QK-norm")
    if attention.softcap is not None:
        notes.append(f"soft cap {attention.softcap:g}")
    return ", ".join(notes)


def _feed_forward(feed_forward: FeedForward) -> str:
    if feed_forward.kind == "mlp":
        return _mlp(feed_forward)
    router = feed_forward.router
    chosen = f"{router.k} of " if hasattr(router, "k") else ""
    text = f"{chosen}{feed_forward.experts} experts ({router.kind}): {_mlp(feed_forward.expert)}"
    if feed_forward.shared is not None:
        text += f"; shared: {_mlp(feed_forward.shared)}"
    return text


def _mlp(mlp: MlpSpec) -> str:
    widths = ", ".join(map(str, mlp.widths))
    return f"{widths} wide, {mlp.activation}" + (", gated" if mlp.gated else "")
