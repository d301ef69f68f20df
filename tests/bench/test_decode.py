"""Both sides of the decoding benchmark compute the same thing, and the figures add up."""

import pytest

from assay.bench.decode import bench_decode, same_share
from assay.errors import AssayError
from assay.spec.presets import PRESETS, shrink

SPEC = shrink(PRESETS["smollm-135m"].model)


def test_transformers_writes_the_same_ids():
    result = bench_decode(
        SPEC, against="torch", batch_size=2, prompt_tokens=9, new_tokens=6, rounds=2
    )
    assert result.same_tokens == 1.0
    assert result.their_cache in ("dynamic", "static")
    assert result.ratio.min <= result.ratio.median <= result.ratio.max
    assert result.limit == pytest.approx(2 * result.read_bandwidth / result.bytes_read)
    first = result.ours.time_to_first_token
    assert result.ours.prefill.max == pytest.approx(2 * 9 / first.min)


def test_bad_options_get_a_sentence():
    for options, sentence in (
        ({"dtype": "int4"}, "--dtype int4: did you mean 'int8'"),
        ({"against": "jax"}, "--against jax: "),
        ({"new_tokens": 1}, "--new-tokens: found 1"),
    ):
        with pytest.raises(AssayError, match=sentence):
            bench_decode(SPEC, **options)


def test_share_of_equal_ids():
    assert same_share([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75
