"""Commands that look: presets, corpora, show."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from assay.cli.application import (
    Architecture,
    Json,
    Settings,
    app,
    changes_of,
    emit,
    out,
    short,
)


@app.command()
def presets(as_json: Json = False) -> None:
    """The named architectures.

    Example: assay presets
    """
    from assay.spec.accounting import parameters
    from assay.spec.presets import PRESETS

    rows = []
    for preset in PRESETS.values():
        count = parameters(preset.model)
        rows.append(
            {
                "name": preset.name,
                "family": preset.family,
                "source": preset.source,
                "total_params": count.total,
                "active_params": count.active,
                "context": preset.model.context,
                "vocabulary": preset.model.vocab_size,
            }
        )
    if not as_json:
        table = Table("name", "params", "active", "context", "vocab", "source", box=None)
        for row in rows:
            table.add_row(
                f"[bold]{row['name']}[/]",
                short(row["total_params"]),
                short(row["active_params"]),
                f"{row['context']:,}",
                f"{row['vocabulary']:,}",
                escape(row["source"]),
            )
        out().print(table)
    emit({"presets": rows}, as_json)


@app.command()
def corpora(as_json: Json = False) -> None:
    """The named corpora; any path of text or tokens is one too.

    Example: assay corpora
    """
    from assay.data.corpora import PAIRS
    from assay.data.corpora import corpora as named

    rows = [
        {
            "name": corpus.name,
            "size": corpus.size,
            "needs_network": corpus.needs_network,
            "description": corpus.description,
        }
        for corpus in named()
    ]
    rows += [
        {"name": name, "size": None, "needs_network": False, "description": f"{what} (pairs)"}
        for name, what in PAIRS.items()
    ]
    if not as_json:
        table = Table("name", "size", "network", box=None)
        table.add_column("what it is", overflow="fold")
        for row in rows:
            network = "needed" if row["needs_network"] else ""
            size = f"{row['size'] / 1e6:.1f} MB" if row["size"] else "-"
            table.add_row(
                f"[bold]{escape(row['name'])}[/]", size, network, escape(row["description"])
            )
        out().print(table)
    emit({"corpora": rows}, as_json)


@app.command()
def show(model: Architecture, as_json: Json = False, settings: Settings = None) -> None:
    """One architecture: its spec, its parameters by part, its cost a token.

    Example: assay show llama-3-8b
    """
    from assay.spec.accounting import (
        flops_per_token,
        kv_bytes_per_source_token,
        kv_bytes_per_token,
        parameters,
    )

    spec = run_of(model, changes_of(settings)).model
    count, flops = parameters(spec), flops_per_token(spec)
    data = {
        "spec": spec.model_dump(mode="json"),
        "parameters": {name: part.total for name, part in count.parts.items()},
        "total_params": count.total,
        "active_params": count.active,
        "flops_per_token_forward": flops.forward,
        "flops_per_token_train": flops.train,
        "kv_bytes_per_token": kv_bytes_per_token(spec),
        "kv_bytes_per_source_token": kv_bytes_per_source_token(spec),
        "mup": None if spec.mup is None else _mup_changes(spec),
    }
    if not as_json:
        console = out()
        console.print_json(spec.to_json())
        table = Table("part", box=None, title=f"\n{model}", title_justify="left")
        table.add_column("parameters", justify="right")
        table.add_column("forward FLOPs a token", justify="right")
        for name in {**count.parts, **flops.parts}:
            part = count.parts[name].total if name in count.parts else 0
            if name != "ahead" or part:  # multi-token prediction is of training alone
                table.add_row(name, f"{part:,}", f"{flops.parts.get(name, 0):,}")
        table.add_row("[bold]all", f"[bold]{count.total:,}", f"[bold]{flops.forward:,}")
        console.print(table)
        if count.active != count.total:
            console.print(f"active parameters      {count.active:,}")
        console.print(f"training FLOPs a token {flops.train:,} at {spec.context:,} tokens")
        console.print(f"KV cache a token       {data['kv_bytes_per_token']:,} bytes in float32")
        if spec.mup is not None:
            console.print()
            console.print(_mup_table(data["mup"]))
        if spec.encoder is not None:
            of_source = data["kv_bytes_per_source_token"]
            console.print(f"  and a source token   {of_source:,} bytes, made once")
    emit(data, as_json)


def _mup_changes(spec) -> dict[str, Any]:
    """What muP makes of the standard parametrisation, as factors; of widths that all grow alike."""
    mup = spec.mup
    m = spec.d_model / mup.base_width
    base = spec.at_width(mup.base_width)
    attentions = zip(spec.patterns(), base.patterns(), strict=True)
    growths = {
        ours.width(spec.d_model) / block.attentions()[part].width(base.d_model)
        for (_, wide), (_, block) in attentions
        for part, ours in wide.attentions().items()
    }
    return {
        "base_width": mup.base_width,
        "width_multiple": m,
        "groups": {
            "tables, vectors": {"std": 1.0, "adamw_lr": 1.0, "muon_lr": 1.0},
            "matrices": {"std": m**-0.5, "adamw_lr": 1 / m, "muon_lr": 1.0},
            "routers": {"std": m**-0.5, "adamw_lr": 1 / m, "muon_lr": m**-0.5},
            "head": {"std": 1.0, "adamw_lr": 1.0, "muon_lr": 1.0},
        },
        "multipliers": {
            "embedding": mup.embedding,
            "hidden": mup.hidden,
            "logits": mup.output / m,
            "scores": [g**-0.5 for g in sorted(growths)],
        },
    }


def _mup_table(changes: dict[str, Any]) -> Table:
    title = (
        f"muP: width {changes['width_multiple']:g} times the base's {changes['base_width']}; "
        f"factors on the base's"
    )
    table = Table("", box=None, title=title, title_justify="left")
    for name in ("initial std", "AdamW's rate", "Muon's rate", "multiplier"):
        table.add_column(name, justify="right")
    by = changes["multipliers"]
    scores = ", ".join(f"{factor:.4g}" for factor in by["scores"])
    multiplier = {"tables, vectors": f"{by['embedding']:.4g}", "head": f"{by['logits']:.4g}"}
    multiplier["matrices"] = f"{by['hidden']:.4g}"
    for name, group in changes["groups"].items():
        numbers = (f"{group[key]:.4g}" for key in ("std", "adamw_lr", "muon_lr"))
        table.add_row(name, *numbers, multiplier.get(name, ""))
    if scores:
        table.add_row("attention's scores, over 1/sqrt(head)", "", "", "", scores)
    return table


def run_of(model: str, changes: dict[str, Any]):
    """The run that a model's name, folder or file stands for, changed; no weights are read."""
    from assay.loading import run_of as found

    return found(model).changed(changes)
