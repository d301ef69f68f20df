"""Two corpora in one run: three tokens in four from the language's manual, one from its source.

Run: python examples/blend.py
"""

import tempfile

import assay

run = assay.preset(
    "tiny-gpt",
    {
        "data.sources": [
            {"corpus": "python-docs", "weight": 3.0},
            {"corpus": "python-stdlib", "weight": 1.0},
        ],
        "data.tokenizer": "byte",
        "data.held_out": 0.02,  # a smaller part of so much text is enough
        "model.decoder.num_layers": 2,
        "train.budget.amount": 30,
    },
)
shares = {source.corpus: source.weight for source in run.data.sources}
total = sum(shares.values())
print({corpus: f"{weight / total:.0%} of the tokens" for corpus, weight in shares.items()})

result = assay.train(run, tempfile.mkdtemp(prefix="assay-blend-"))
print(f"{result.tokens:,} tokens; {result.val_bpb:.3f} bits per byte over both held-out parts")
