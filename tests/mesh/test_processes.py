"""Real processes that train as one, on this machine: what they compute, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from assay.data import loader
from assay.errors import AssayError
from assay.model.sharding import make_mesh, partition
from assay.spec import presets
from assay.spec.run import MeshSpec
from assay.train import processes
from assay.train.loop import read_run, train
from tests.train.conftest import lines, made_text

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"
SMALL = {
    "model.d_model": 32,
    "model.decoder.num_layers": 1,
    "model.decoder.pattern.*.feed_forward.hidden": 64,
    "data.batch_size": 8,
    "data.seq_len": 16,
    "data.tokenizer": "byte",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(made_text(2000))
    return path


def flags(corpus: Path, **more) -> list[str]:
    settings = {**SMALL, "data.tokenizer": '"byte"', **more}
    given = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
    return ["tiny-gpt", "--data", str(corpus), *given]


def start(count: int, arguments: list[str], devices: int = 1, **environment) -> subprocess.Popen:
    """Processes of some devices each, by the launcher; their output in one pipe each way."""
    variables = os.environ | {
        "ASSAY": f"{sys.executable} -m assay.cli",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **environment,
    }
    return subprocess.Popen(
        [LAUNCH / "local.sh", str(count), *arguments],
        env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def results(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def until(what, seconds: float, process: subprocess.Popen):
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(out)}


def children(launcher: subprocess.Popen) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    return sorted(map(int, listed.stdout.split()))


def test_processes_train_as_one_and_go_on_in_another_number(corpus, tmp_path):
    """Two processes of two devices; then one process of four; then one device."""
    every = {"train.budget.amount": 30, "train.log_every": 1}
    run = presets.get("tiny-gpt").run.changed(
        SMALL | every | {"data.sources": [{"corpus": str(corpus)}]}
    )
    train(run, tmp_path / "one")
    expected = losses(tmp_path / "one")
    out = tmp_path / "several"
    mesh = ["--mesh", "data=2,fsdp=2", "--stop-at", "10", "--json", "--out", str(out)]
    launched = start(2, [*flags(corpus, **every), *mesh], devices=2)
    output, errors = launched.communicate(timeout=300)
    assert launched.returncode == 0, errors
    (result,) = results(output)  # of the first process, and of no other
    assert errors.count("Compiling for") == 1
    assert (result["steps"], result["stopped_by"]) == (10, "stop-at")
    held = read_run(out)
    assert held.mesh == MeshSpec(data=2, fsdp=2)
    train(held.replace(mesh=MeshSpec(fsdp=2, tensor=2)), out, resume=True, stop_at=20)
    train(held.replace(mesh=MeshSpec()), out, resume=True)
    found = losses(out)
    assert found.keys() == expected.keys() == set(range(1, 31))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-4), step


def test_one_that_dies_ends_all_and_a_restart_goes_on(corpus, tmp_path):
    """SIGKILL to one of two; then four go on, and SIGTERM to one of them saves and ends all."""
    out = tmp_path / "out"
    every = {"train.budget.amount": 100_000, "train.checkpoint_every": 5}
    launched = start(2, [*flags(corpus, **every), "--mesh", "data=2", "--out", str(out)])
    checkpoints = out / "checkpoints"
    until(lambda: (checkpoints / "10").is_dir(), 240, launched)
    os.kill(children(launched)[1], signal.SIGKILL)
    began = time.monotonic()
    _, errors = launched.communicate(timeout=processes.HEARTBEAT + 30)
    assert time.monotonic() - began < processes.HEARTBEAT + 15
    assert launched.returncode != 0
    assert "another process of the run was lost" in errors or "another task died" in errors
    reached = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    assert reached >= 10
    # ---- four go on
    again = ["--resume", "--out", str(out), "--mesh", "data=2,fsdp=2", "--json"]
    launched = start(4, again)
    later = checkpoints / str(reached + 10)
    until(later.is_dir, 240, launched)
    os.kill(children(launched)[2], signal.SIGTERM)
    began = time.monotonic()
    output, errors = launched.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert launched.returncode == 0, errors
    (result,) = results(output)
    assert (result["stopped_by"], result["finished"]) == ("SIGTERM", False)
    assert (checkpoints / str(result["steps"])).is_dir()
    steps = list(losses(out))
    assert steps == sorted(set(steps))


def test_slurms_variables_are_enough(corpus, tmp_path):
    """As `srun` sets them, for a job of one process."""
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1"}
    slurm |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    code = (
        "from assay.train.processes import join, rank; join('auto'); import jax;"
        "from jax._src.distributed import global_state as s; print(rank(), s.coordinator_address)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | slurm, capture_output=True, text=True
    )
    assert done.stdout.split()[0] == "0", done.stderr
    assert done.stdout.split()[1].startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((None, 2, 0), "they need --coordinator"),
        (("localhost", 2, 0), "expected HOST:PORT"),
        (("localhost:1234", None, 0), "set JAX_NUM_PROCESSES"),
        (("localhost:1234", 2, 2), "legal are 0 to 1"),
    ],
)
def test_what_is_missing_is_named(given, says, monkeypatch):
    for variable in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(AssayError, match=says):
        processes.join(*given)


# ---------------------------------------------------------------------------- whose rows


def test_each_process_reads_only_its_rows(corpus):
    """Of one that has some devices of a mesh: it reads their rows, and makes the same batch."""
    spec = presets.get("tiny-gpt").run.changed(SMALL | {"data.sources": [{"corpus": str(corpus)}]})
    prepared, mesh = loader.prepare(spec.data), make_mesh(MeshSpec(data=4, tensor=2))
    sharding = jax.sharding.NamedSharding(mesh, partition(("batch", None)))
    rows = processes.Rows(sharding, 8)
    assert rows.own == list(range(8))
    with loader.batches(prepared, 0) as batches:
        whole = next(batches)
    joined = rows.join(whole)
    for name, array in joined.items():
        np.testing.assert_array_equal(array, whole[name])
        assert array.sharding == sharding
    with loader.batches(prepared, 0, rows=[2, 3, 6, 7]) as batches:
        part = next(batches)
    assert {name: x.shape[0] for name, x in part.items()} == dict.fromkeys(part, 4)
    np.testing.assert_array_equal(part["tokens"], whole["tokens"][[2, 3, 6, 7]])


# ---------------------------------------------------------------------------- files to launch it


@pytest.mark.parametrize("name", ["local.sh", "slurm.sh", "tpu-pod.sh"])
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert os.access(LAUNCH / name, os.X_OK)


def options_are_known(command: str) -> None:
    """Every option in a command line is one of `assay train`'s."""
    listed = subprocess.run(
        [sys.executable, "-m", "assay.cli", "train", "--help"],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"},
    ).stdout  # fmt: skip
    for word in command.replace("(", " ").replace(")", " ").split():
        if word.startswith("--"):
            assert word.split("=")[0] in listed, word


def test_the_tpu_script_shows_what_it_would_run():
    done = subprocess.run(
        [LAUNCH / "tpu-pod.sh"],
        env=os.environ | {"TPU": "pod", "ZONE": "z", "OUT": "/shared/run", "DRY_RUN": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("gcloud compute tpus tpu-vm ssh pod --zone=z --worker=all")
    assert "--coordinator" in done.stdout


def test_the_jobset_gives_every_pod_its_number():
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job["spec"]["replicatedJobs"]
    inner = replicated["template"]["spec"]
    assert inner["completionMode"] == "Indexed"
    assert inner["parallelism"] == inner["completions"]
    (container,) = inner["template"]["spec"]["containers"]
    variables = {entry["name"]: entry for entry in container["env"]}
    host, port = variables["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == f"{job['metadata']['name']}-{replicated['name']}-0-0.{job['metadata']['name']}"
    assert {"containerPort": int(port)} in container["ports"]
    assert variables["JAX_NUM_PROCESSES"]["value"] == str(inner["completions"])
    field = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in inner["template"]["spec"]["volumes"]}
    script = container["args"][0]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    options_are_known(script)


def test_skypilot_starts_a_process_a_node():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    known = {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}
    assert task.keys() == known
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    variables = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    variables["SKYPILOT_NODE_RANK"] = "1"
    exports = "\n".join(line for line in task["run"].splitlines() if "export" in line)
    exports += "\necho $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"
    shown = subprocess.run(
        ["bash", "-c", exports],
        env=os.environ | variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.split() == ["10.0.0.1:8476", "2", "1"]
