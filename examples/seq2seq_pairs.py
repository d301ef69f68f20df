"""An encoder-decoder trained on pairs of a file: it learns to turn words round.

The preset nano-seq2seq, made smaller; each line of the file is a source and a target. Then it is
asked for words that it has never seen, greedily and by beam search.

Run: python examples/seq2seq_pairs.py
"""

import tempfile
from itertools import product
from pathlib import Path
from random import Random

import assay
from assay.generate.text import complete_batch, complete_by_beams

words = ["".join(letters) for letters in product("abcd", repeat=4)]
Random(0).shuffle(words)
folder = Path(tempfile.mkdtemp())
(folder / "pairs.tsv").write_text("".join(f"{word}\t{word[::-1]}\n" for word in words))

run = assay.preset(
    "nano-seq2seq",
    {
        "data.sources": [{"corpus": str(folder / "pairs.tsv")}],
        "data.seq_len": 5,  # four letters and the end
        "model.d_model": 64,
        "model.encoder.num_layers": 1,
        "model.decoder.num_layers": 1,
        "train.budget.amount": 200,
    },
)
result = assay.train(run, folder / "run")
print(f"held-out targets: {result.val_bpb:.3f} bits per byte")

loaded = assay.load(folder / "run")
unseen = words[-25:]  # the last tenth is held out
done = complete_batch(loaded.model, loaded.tokenizer, unseen, max_new_tokens=8, temperature=0)
right = sum(out.text == word[::-1] for out, word in zip(done, unseen, strict=True))
print(f"whole words turned round right, never seen: {right / len(unseen):.1%}")

(beams,) = complete_by_beams(
    loaded.model, loaded.tokenizer, [unseen[0]], beams=3, max_new_tokens=8, length_penalty=1.0
)
for beam in beams:
    print(f"{unseen[0]} -> {beam.text}   log P / length {beam.score:.3f}")
