"""Every example runs as it stands, and shows what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# What each prints when it has worked; a number in it is held against the least that it must be.
SHOWS = {
    "multi_query_decoder": [r"\(2, 10, 64\)", "no sight of the future: True"],
    "jaxformers_lm": [r"never seen: (?P<percent>[\d.]+)%"],
    "jaxformers_seq2seq": [r"never seen before: (?P<percent>[\d.]+)%"],
    "make_moe": [
        r"TopKRouter[^N]*?(?P<bpb>[\d.]+) bits per byte",
        r"NoisyTopKRouter\s.*?(?P<bpb>[\d.]+) bits per byte",
        r"at temperature 0.8: ['\"]",
    ],
    "seq2seq_pairs": [r"(?P<bpb>[\d.]+) bits per byte", r"never seen: (?P<percent>[\d.]+)%"],
    "quickstart": [r"(?P<bpb>[\d.]+) bits per byte", "The for statement"],
    "custom_architecture": [r"\[32, 16, 16, None", r"(?P<bpb>[\d.]+) bits per byte"],
    "blend": ["75% of the tokens", r"(?P<bpb>[\d.]+) bits per byte"],
}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SHOWS}


@pytest.mark.parametrize("name", SHOWS)
def test_example(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=os.environ
        | {"XLA_FLAGS": "", "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    for pattern in SHOWS[name]:
        match = re.search(pattern, done.stdout)
        assert match, done.stdout
        numbers = match.groupdict()
        if "percent" in numbers:
            assert float(numbers["percent"]) > 80  # a guess is right in 3 % of cases or fewer
        if "bpb" in numbers:
            assert 0 < float(numbers["bpb"]) < 7.5  # 8 is what knowing nothing costs
