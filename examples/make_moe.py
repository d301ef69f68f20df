"""makeMoE's example: a sparse mixture of experts reads text by the character, and writes some.

The names are makeMoE-JAX's. Its training gave the inputs as targets, so the model learned to
repeat what it reads; here the target is the next character. Both of its routers are trained, on
the same batches: plain top-k, and noisy top-k, whose noise is drawn in training only.

Run: python examples/make_moe.py
"""

import tempfile
from pathlib import Path

import assay
from assay.spec.model import NoisyTopK, TopK
from assay.spec.presets import get

# Small, for seconds on a laptop; `assay train make-moe --data shakespeare` is makeMoE's own size.
model_config = {
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "block_size": 64,
    "num_experts": 4,
    "top_k": 2,
    "dropout_rate": 0.0,
}
num_steps = 150
batch_size = 16
learning_rate = 3e-3
routers = {
    "TopKRouter": TopK(k=model_config["top_k"], bias=True),
    "NoisyTopKRouter": NoisyTopK(k=model_config["top_k"], bias=True),
}


def create_train_state(router: TopK | NoisyTopK) -> assay.RunSpec:
    """Everything that decides a run: the preset make-moe, with the differences above."""
    c, block = model_config, "model.decoder.pattern.*"
    return get("make-moe").run.changed(
        {
            "model.d_model": c["n_embd"],
            "model.context": c["block_size"],
            "model.decoder.num_layers": c["n_layer"],
            "model.embedding.dropout": c["dropout_rate"],
            f"{block}.dropout": c["dropout_rate"],
            f"{block}.attention.dropout": c["dropout_rate"],
            f"{block}.attention.heads": c["n_head"],
            f"{block}.feed_forward.experts": c["num_experts"],
            f"{block}.feed_forward.expert.hidden": 4 * c["n_embd"],
            f"{block}.feed_forward.router": router.model_dump(),
            "data.sources": [{"corpus": "python-docs"}],
            "data.seq_len": c["block_size"],
            "data.batch_size": batch_size,
            "optimizer.lr": learning_rate,
            "train.budget": {"unit": "steps", "amount": num_steps},
        }
    )


def train_model(run: assay.RunSpec, folder: Path) -> None:
    """The real training: shifted targets, dropout and noise, held-out text never trained on."""
    result = assay.train(run, folder)
    print(f"  {result.tokens:,} characters read; held-out text {result.val_bpb:.3f} bits per byte")


def main() -> None:
    with tempfile.TemporaryDirectory() as parent:
        for name, router in routers.items():
            print(name)
            folder = Path(parent) / name
            train_model(create_train_state(router), folder)
            for temperature in (0.0, 0.8):
                written = assay.generate(
                    folder, "The for statement", max_new_tokens=40, temperature=temperature, seed=0
                )
                print(f"  at temperature {temperature}: {written.text!r}")


if __name__ == "__main__":
    main()
