"""An architecture of one's own: three local layers, then one that sees everything.

Local layers look back 16 tokens and rotate their queries and keys; the global one has no positions
and fewer kv heads. `pattern` says it once, and the stack repeats it.

Run: python examples/custom_architecture.py
"""

import tempfile

import jax
import jax.numpy as jnp

import assay
from assay.spec.accounting import parameters
from assay.spec.model import AttentionSpec, BlockSpec, MlpSpec, RmsNorm, Rope, StackSpec
from assay.spec.run import AdamWSpec, BudgetSpec, ComputeSpec, CosineSchedule, DataSpec, TrainSpec

swiglu = MlpSpec(hidden=192, activation="silu", gated=True)
local = BlockSpec(
    attention=AttentionSpec(heads=4, kv_heads=2, window=16, positions=Rope()),
    feed_forward=swiglu,
)
everywhere = BlockSpec(attention=AttentionSpec(heads=4, kv_heads=1), feed_forward=swiglu)

spec = assay.TransformerSpec(
    vocab_size=257,  # bytes, and the end of a document
    d_model=64,
    context=128,
    decoder=StackSpec(
        pattern=(local, local, local, everywhere), num_layers=8, final_norm=RmsNorm()
    ),
)
print(f"{parameters(spec).total:,} parameters, counted from the spec alone")

# A spec is data: it reads back from JSON as it was, and a variant is a small difference.
assert assay.TransformerSpec.from_json(spec.to_json()) == spec
wider = spec.at("decoder.pattern.0.attention.window", 32)
print("windows:", [block.attention.window for block in wider.decoder.blocks()])

# The model that the spec describes, on a batch of bytes: logits of the next byte at every place.
model = assay.Transformer(spec, rngs=jax.random.key(0))
tokens = jnp.asarray([list(b"a local and a global pattern")], dtype=jnp.int32)
print("logits:", jax.jit(assay.Transformer.__call__)(model, tokens).shape)

# And trained, a few steps.
run = assay.RunSpec(
    model=spec,
    data=DataSpec(seq_len=128, batch_size=8),
    optimizer=AdamWSpec(lr=3e-3),
    schedule=CosineSchedule(warmup=5),
    train=TrainSpec(budget=BudgetSpec(amount=30)),
    compute=ComputeSpec(scan_layers=True),  # compile one period of the pattern, not 8 layers
)
result = assay.train(run, tempfile.mkdtemp(prefix="assay-custom-"))
print(f"after {result.steps} updates: {result.val_bpb:.3f} bits per byte of held-out text")
