import pytest

from assay.errors import AssayError
from assay.plan.topology import CHIPS, parse_topology


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64),
        ("v5p-128", "v5p:4x4x4", 64),  # Cloud TPU's name counts cores
        ("v5p-256", "v5p:4x4x8", 128),
        ("v4-8", "v4:1x2x2", 4),
        ("v5e-256", "v5e:16x16", 256),
        ("v6e:2x4", "v6e:2x4", 8),
        ("v5e", "v5e:1x1", 1),
        ("h100:8", "h100:8", 8),
        ("a100-40gb:16", "a100-40gb:16", 16),
        ("a100-40gb", "a100-40gb:1", 1),
    ],
)
def test_names_of_machines(text, name, devices):
    topology = parse_topology(text)
    assert (topology.name, topology.devices) == (name, devices)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("v5q:4x4x4", "v5p"),
        ("v5p:4x4x4x4", "3 torus axes"),
        ("v6e:32x32", "a pod of TPU v6e has 256"),
        ("h100:8x8", "h100:8"),
        ("h100-8", "h100:8"),
        ("v5p:4*4", "expected CHIP:SHAPE"),
        ("v5p:0x4x4", "no chips"),
        ("v5p-127", "counts cores, of which a chip has two"),
        ("cpu:2", "'cpu' is this machine, and one device"),
        ("cpus", "did you mean 'cpu'"),
    ],
)
def test_a_wrong_name_is_answered_in_a_sentence(text, sentence):
    with pytest.raises(AssayError, match="topology: ") as error:
        parse_topology(text)
    assert sentence in str(error.value)


def test_this_cpu_is_measured():
    chip = parse_topology("cpu").chip
    assert chip.peak > 1e9
    assert 1e8 < chip.bandwidth < 1e12
    assert chip.memory > 2**30


def test_chips_are_named_by_their_key():
    assert all(name == chip.name and chip.source for name, chip in CHIPS.items())
