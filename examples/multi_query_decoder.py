"""The README example of Jax Transformer (multi-query): random vectors through a decoder.

Run: python examples/multi_query_decoder.py
"""

import jax

from assay.functional import causal_mask, init_transformer_decoder, transformer_decoder

# Define model dimensions
batch_size = 2
seq_len = 10
sizes = {"num_layers": 6, "num_heads": 8, "d_model": 64, "d_ff": 256}

# Random input tensor (representing tokens in the sequence), and the decoder's weights
input_key, weights_key = jax.random.split(jax.random.key(0))
x = jax.random.normal(input_key, (batch_size, seq_len, sizes["d_model"]))
params = init_transformer_decoder(weights_key, **sizes)

# Generate causal mask for auto-regressive behaviour
mask = causal_mask(seq_len)

# Run the input through the decoder
output = transformer_decoder(x, mask, **sizes, params=params)
print(output.shape)  # (batch_size, seq_len, d_model)

# What the mask promises: another last token changes no output before it
changed = transformer_decoder(x.at[:, -1].set(0.0), mask, **sizes, params=params)
print("no sight of the future:", bool((changed[:, :-1] == output[:, :-1]).all()))
