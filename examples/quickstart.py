"""From a named architecture to text and a score: spec, train, evaluate, generate.

Run: python examples/quickstart.py [folder]
"""

import sys
import tempfile

import assay

out = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="assay-quickstart-")

# A preset is an architecture with a default run. Here: bytes, and 100 updates.
run = assay.preset(
    "tiny-gpt",
    {
        "data.sources": [{"corpus": "python-docs"}],  # every Python ships it: no network
        "data.tokenizer": "byte",
        "optimizer.lr": 3e-3,
        "schedule.warmup": 10,
        "train.budget.amount": 100,
    },
)

# The folder gets run.json, metrics.jsonl, checkpoints and loss.png.
result = assay.train(run, out)
print(f"{result.steps} updates in {result.seconds:.0f} s; the held-out part of the corpus costs")
print(f"{result.val_loss:.3f} nats a token, {result.val_bpb:.3f} bits per byte")

# Load it as any later program would, and let it write.
loaded = assay.load(out)
completion = assay.generate(loaded, "The for statement", max_new_tokens=40, temperature=0.8, seed=1)
print("The for statement" + completion.text)
