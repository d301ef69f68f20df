"""The Hub over HTTP: a server of this machine stands for it, all else is the packages' own.

Models, data sets for corpora and tasks, and the harness' official tasks are fetched by their
names, by a process that has never seen them.
"""

import json
import os
import subprocess
import sys

import pytest
from tests.interop.hub_server import Hub
from tests.interop.test_convert import make
from tests.parity.test_harness import documents

from assay.data import tokenizers

COMMANDS = """
import contextlib, io, json, sys
from assay import cli

for line in json.load(open(sys.argv[1])):
    sys.argv = ["assay", *line]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    last = out.getvalue().splitlines()[-1:] or [""]
    print("answer", json.dumps([status, last[0], err.getvalue()]), flush=True)
"""


def put(folder, config: str, splits: dict[str, list[dict]]) -> None:
    """A data set as it lies on the Hub: parquet, and a card that says which file is what."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / config).mkdir(parents=True)
    card = f"- config_name: {config}\n  data_files:\n"
    for split, rows in splits.items():
        name = f"{config}/{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
        card += f"  - split: {split}\n    path: {name}\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    text = " ".join(json.dumps(documents(name)) for name in ("hellaswag", "arc_easy", "piqa"))
    tokenizer = tokenizers.CharTokenizer(text + "Question:\nAnswer")
    folder = make(root / "someone" / "some-model", "smollm", vocab_size=tokenizer.vocab_size)
    for name, content in tokenizers.huggingface_files(tokenizer).items():
        (folder / name).write_text(content)
    sets, splits = root / "datasets", ("train", "validation", "test")
    for name, owner, config in (
        ("hellaswag", "Rowan/hellaswag", "default"),
        ("arc_easy", "allenai/ai2_arc", "ARC-Easy"),
        ("piqa", "baber/piqa", "default"),
    ):
        put(sets / owner, config, dict.fromkeys(splits, documents(name)))
    rows = [{"text": f"story {i}, naïve"} for i in range(10)]
    put(sets / "someone" / "stories", "default", {"train": rows})
    return root


def test_all_that_comes_from_the_hub(root, tmp_path):
    model = "someone/some-model"
    # One process, for a start takes seconds: what is fetched, then what is not there.
    lines = [
        ["generate", model, "--prompt", "the cat", "--max-new-tokens", "3", "--json"],
        ["eval", model, "--task", "piqa", "--limit", "2", "--json"],
        ["eval", model, "--harness", "hellaswag,arc_easy", "--limit", "2", "--json"],
        ["data", "prepare", "hf:someone/stories:train:4", "--out", str(tmp_path / "tokens")],
        ["show", "someone/no-model"],
        ["eval", model, "--task", "winogrande"],
        ["data", "prepare", "hf:someone/no-set", "--out", str(tmp_path / "other")],
    ]
    lines[3] += ["--tokenizer", "byte", "--workers", "1", "--json"]
    script, asked = tmp_path / "commands.py", tmp_path / "commands.json"
    script.write_text(COMMANDS)
    asked.write_text(json.dumps(lines))
    with Hub(root) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "ASSAY_CACHE": str(tmp_path / "cache"),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        run = subprocess.run(
            [sys.executable, script, asked],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    answers = [
        json.loads(line.removeprefix("answer "))
        for line in run.stdout.splitlines()
        if line.startswith("answer ")
    ]
    assert len(answers) == len(lines), run.stderr
    assert [status for status, *_ in answers] == [0] * 4 + [2] * 3, answers
    generated, task, harness, prepared = (json.loads(out) for _, out, _ in answers[:4])
    assert generated["prompt_tokens"] == 7
    assert (task["task"], task["examples"]) == ("piqa", 2)
    assert harness["harness"].keys() == {"hellaswag", "arc_easy"}
    assert all(0 <= of["acc_norm,none"] <= 1 for of in harness["harness"].values())
    assert prepared["documents"] == 4
    assert prepared["bytes"] == sum(len(f"story {i}, naïve".encode()) for i in range(4))
    for (_, _, err), what in zip(answers[4:], ("no-model", "winogrande", "no-set"), strict=True):
        (sentence,) = [line for line in err.splitlines() if line]
        assert sentence.startswith("assay: "), err
        assert what in sentence
    assert any("hellaswag/resolve" in path for path in hub.asked)
