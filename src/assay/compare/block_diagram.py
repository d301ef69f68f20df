"""A picture of an architecture as a small SVG, from its spec as plain data."""

from collections.abc import Mapping
from html import escape
from typing import Any

WIDTH, BOX, GAP = 260, 30, 12
COLOURS = {
    "attention": "#56B4E9",
    "mlp": "#E69F00",
    "moe": "#009E73",
    "norm": "#BBBBBB",
    "table": "#CC79A7",
}


def draw_diagram(spec: Mapping[str, Any]) -> str:
    """The stack of a `TransformerSpec` (as JSON has it) from tokens below to logits above.

    Each entry of the pattern is drawn once, with the number of layers that it stands for. Colours
    of lines and text are the page's own (`currentColor`). Returns the text of an `<svg>`; empty
    for an empty spec.
    """
    if not spec.get("decoder"):
        return ""
    stacks = [s for s in ("encoder", "decoder") if spec.get(s)]
    parts: list[str] = []
    height = max(_stack(spec, name, i * (WIDTH + 40), parts) for i, name in enumerate(stacks))
    wide = len(stacks) * (WIDTH + 40) - 20
    label = "encoder and decoder" if len(stacks) > 1 else "decoder"
    return (
        f'<svg class="diagram" viewBox="0 0 {wide} {height}" width="{wide}" height="{height}" '
        f'role="img" aria-label="diagram of the {label}" font-size="12" '
        f'font-family="system-ui, sans-serif" text-anchor="middle">{"".join(parts)}</svg>'
    )


def _stack(spec: Mapping[str, Any], name: str, left: int, parts: list[str]) -> int:
    """Draws one stack from the top down, and returns its height."""
    stack = spec[name]
    centre, y = left + WIDTH / 2 + 5, 8

    def box(text: str, kind: str) -> None:
        nonlocal y
        parts.append(
            f'<rect x="{left + 40}" y="{y}" width="{WIDTH - 70}" height="{BOX}" rx="5" '
            f'fill="{COLOURS[kind]}" fill-opacity=".35" stroke="currentColor"/>'
            f'<text x="{centre}" y="{y + 19}" fill="currentColor">{escape(text)}</text>'
        )
        y += BOX

    def line(length: int = GAP) -> None:
        nonlocal y
        parts.append(
            f'<path d="M{centre} {y}v{length}" stroke="currentColor" fill="none" opacity=".7"/>'
        )
        y += length

    head = spec.get("head")
    if name == "decoder" and head is not None:
        tied = isinstance(head, Mapping) and head.get("tied", head.get("tie"))
        box("head, tied to the embedding" if tied else "head", "table")
        line()
    if stack.get("final_norm"):
        box(_norm(stack["final_norm"]), "norm")
        line()
    pattern, layers = stack["pattern"], stack["num_layers"]
    for i in reversed(range(min(len(pattern), layers))):
        block = pattern[i]
        top = y
        y += GAP
        for above, labels in reversed(_parts(block)):
            for text, kind in above:
                box(text, kind)
                line(6)
            below = y
            parts.append(
                f'<circle cx="{centre}" cy="{y + 8}" r="8" fill="none" stroke="currentColor"/>'
                f'<text x="{centre}" y="{y + 12}" fill="currentColor">+</text>'
            )
            y += 16
            for text, kind in labels:
                line(6)
                box(text, kind)
            line()
            # The residual path, around the part and into the sum.
            parts.append(
                f'<path d="M{centre} {y - 4}H{left + WIDTH - 12}V{below + 8}H{centre + 8}" '
                f'stroke="currentColor" fill="none" opacity=".7"/>'
            )
        count = len(range(i, layers, len(pattern)))
        parts.append(
            f'<rect x="{left + 22}" y="{top}" width="{WIDTH - 22}" height="{y - top}" rx="9" '
            f'fill="none" stroke="currentColor" stroke-dasharray="4 3" opacity=".6"/>'
            f'<text x="{left + 10}" y="{(top + y) / 2}" fill="currentColor" font-weight="bold" '
            f'transform="rotate(-90 {left + 10} {(top + y) / 2})">&#215; {count}</text>'
        )
        line()
    box(f"embedding, d {spec['d_model']}{_positions(spec)}", "table")
    return round(y + 8)


def _parts(block: Mapping[str, Any]) -> list[tuple[list, list]]:
    """Of each residual part, in the order of the forward: boxes above the sum, and in the branch.

    The top one first.
    """
    parts = []
    if block.get("attention"):
        parts.append((_attention(block["attention"]), "attention"))
    if block.get("cross"):
        parts.append(("attention to the encoder", "attention"))
    if block.get("feed_forward"):
        parts.append(_feed_forward(block["feed_forward"]))
    norm = (_norm(block.get("norm")), "norm")
    where = block.get("norm_position", "pre")
    before = [norm] if where in ("pre", "both") else []
    after = [norm] if where == "both" else []
    above = [norm] if where == "post" else []
    return [(above, [*after, part, *before]) for part in parts]


def _attention(spec: Mapping[str, Any]) -> str:
    heads = spec.get("heads")
    narrow = spec.get("kv_heads") or heads
    kind = "MHA" if narrow == heads else "MQA" if narrow == 1 else "GQA"
    text = f"{kind} {heads}" + ("" if narrow == heads else f"/{narrow}")
    positions = (spec.get("positions") or {}).get("kind", "none")
    if positions != "none":
        text += f", {'RoPE' if positions == 'rope' else positions}"
    if spec.get("window"):
        text += f", window {spec['window']}"
    return text


def _feed_forward(spec: Mapping[str, Any]) -> tuple[str, str]:
    if spec.get("kind") == "moe":
        router = spec.get("router") or {}
        chosen = f"top {router['k']}" if "k" in router else router.get("kind", "")
        shared = " + shared" if spec.get("shared") else ""
        return f"{spec.get('experts')} experts, {chosen.replace('_', ' ')}{shared}", "moe"
    hidden = spec.get("hidden")
    widths = "-".join(map(str, hidden)) if isinstance(hidden, list | tuple) else str(hidden)
    name = "GLU" if spec.get("gated") else "MLP"
    return f"{name} {widths}, {str(spec.get('activation', '')).replace('_', ' ')}", "mlp"


def _norm(spec: Mapping[str, Any] | None) -> str:
    kind = (spec or {}).get("kind", "norm")
    return {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}.get(kind, kind)


def _positions(spec: Mapping[str, Any]) -> str:
    embedding = spec.get("embedding") or {}
    positions = embedding.get("positions") or spec.get("positions") or {}
    kind = positions.get("kind", "none")
    return "" if kind == "none" else f" + {kind}"
