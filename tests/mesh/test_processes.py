"""Real processes that train as one, on this machine: what they compute, and how they end."""

import json
import os
import signal
import socket
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


def score_of(out: Path) -> float:
    """The newest held-out loss."""
    written = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["val_loss"] for line in written if "val_loss" in line][-1]


def children(launcher: subprocess.Popen) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True)
    return sorted(map(int, listed.stdout.split()))


def test_processes_train_as_one_and_go_on_in_another_number(corpus, tmp_path):
    """Two processes of two devices; then four of one; then one device of this process.

    The held-out score is each time that of the one process, whoever read which rows.
    """
    every = {"train.budget.amount": 30, "train.log_every": 1}
    run = presets.get("tiny-gpt").run.changed(
        SMALL | every | {"data.sources": [{"corpus": str(corpus)}]}
    )
    train(run, tmp_path / "one", stop_at=10)
    scores = [score_of(tmp_path / "one")]
    train(run, tmp_path / "one", resume=True, stop_at=20)
    scores += [score_of(tmp_path / "one")]
    train(run, tmp_path / "one", resume=True)
    expected = losses(tmp_path / "one")
    out = tmp_path / "several"
    mesh = ["--mesh", "data=2,fsdp=2", "--stop-at", "10", "--json", "--out", str(out)]
    launched = start(2, [*flags(corpus, **every), *mesh], devices=2)
    output, errors = launched.communicate(timeout=300)
    assert launched.returncode == 0, errors
    (result,) = results(output)  # of the first process, and of no other
    assert "Rank 2" not in output + errors  # as Gloo says of a device of the other process
    assert errors.count("Compiling for") == 1
    assert (result["steps"], result["stopped_by"]) == (10, "stop-at")
    assert result["val_loss"] == pytest.approx(scores[0], rel=1e-5)
    held = read_run(out)
    assert held.mesh == MeshSpec(data=2, fsdp=2)
    again = ["--resume", "--out", str(out), "--mesh", "fsdp=2,tensor=2", "--stop-at", "20"]
    launched = start(4, [*again, "--json"])
    output, errors = launched.communicate(timeout=400)
    assert launched.returncode == 0, errors
    (result,) = results(output)
    assert result["val_loss"] == pytest.approx(scores[1], rel=1e-4)
    train(held.replace(mesh=MeshSpec()), out, resume=True)
    found = losses(out)
    assert found.keys() == expected.keys() == set(range(1, 31))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-4), step


DIES = """
import os, signal, sys, time
from pathlib import Path
from assay.cli import main
from assay.train.checkpoint import Checkpoints
save = Checkpoints.save
def dies(self, state, *rest):
    save(self, state, *rest)
    if int(state.step) == 15:
        (self.folder / "died").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[-1] == "1":
    Checkpoints.save = dies
main()
"""


def test_one_that_dies_ends_all_and_a_restart_goes_on(corpus, tmp_path):
    """SIGKILL to one of two, while both write a checkpoint; the other ends at once, and says why.

    Then four go on, and SIGTERM to one of them saves and ends all.
    """
    out = tmp_path / "out"
    every = {"train.budget.amount": 100_000, "train.checkpoint_every": 5}
    (tmp_path / "dies.py").write_text(DIES)
    launched = start(
        2, [*flags(corpus, **every), "--mesh", "data=2", "--out", str(out)],
        ASSAY=f"{sys.executable} {tmp_path / 'dies.py'}",
    )  # fmt: skip
    _, errors = launched.communicate(timeout=300)
    checkpoints = out / "checkpoints"
    assert time.time() - float((checkpoints / "died").read_text()) < processes.HEARTBEAT / 2
    assert launched.returncode == 128 + signal.SIGKILL  # that of the killed
    assert "process 0 of 2: another process of the run was lost" in errors
    assert "Traceback" not in errors
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "sent"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)], ids=["first-dies", "one-hangs"]
)
def test_the_first_dies_or_one_hangs(corpus, tmp_path, which, sent):
    """The others know within the heartbeat, and the launcher ends what hangs."""
    out = tmp_path / "out"
    every = {"train.budget.amount": 100_000, "train.checkpoint_every": 5}
    launched = start(2, [*flags(corpus, **every), "--mesh", "data=2", "--out", str(out)])
    until((out / "checkpoints" / "10").is_dir, 400, launched)
    both = children(launched)
    os.kill(both[which], sent)
    began = time.monotonic()
    until(lambda: not Path(f"/proc/{both[1 - which]}").exists(), processes.HEARTBEAT + 30, launched)
    noticed = time.monotonic() - began
    _, errors = launched.communicate(timeout=60)
    print(f"\n{signal.Signals(sent).name} to process {which}: the other ended after "
          f"{noticed:.1f} s, the launcher after {time.monotonic() - began:.1f} s")  # fmt: skip
    assert launched.returncode != 0
    assert "another process of the run was lost" in errors or "another task died" in errors
    assert "Start all of them again with --resume" in errors
    assert not Path(f"/proc/{both[which]}").exists()
    # ---- a restart goes on
    reached = max(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    launched = start(2, ["--resume", "--out", str(out), "--stop-at", str(reached + 2)])
    _, errors = launched.communicate(timeout=400)
    assert launched.returncode == 0, errors
    assert max(losses(out)) == reached + 2 or (out / "checkpoints" / str(reached + 2)).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_sigterm_saves_and_ends_in_seconds(corpus, tmp_path, count):
    """Sent to the last of them alone; prints how long it took until all were gone."""
    out = tmp_path / "out"
    every = {"train.budget.amount": 100_000, "train.checkpoint_every": 100_000}
    mesh = ["--mesh", f"data={count}", "--out", str(out), "--json"]
    launched = start(count, [*flags(corpus, **every, **{"train.log_every": 1}), *mesh])

    def written() -> int:
        file = out / "metrics.jsonl"
        return file.read_text().count("\n") if file.is_file() else 0

    until(lambda: written() > 20, 400, launched)
    last = children(launched)[-1]
    before = written()
    os.kill(last, signal.SIGTERM)
    began = time.monotonic()
    output, errors = launched.communicate(timeout=60)
    seconds = time.monotonic() - began
    (result,) = results(output)
    print(f"\nSIGTERM to one of {count}: all ended after {seconds:.1f} s, saved at step "
          f"{result['steps']}, of which {before} were done")  # fmt: skip
    assert launched.returncode == 0, errors
    assert (result["stopped_by"], result["finished"]) == ("SIGTERM", False)
    assert (out / "checkpoints" / str(result["steps"])).is_dir()
    assert seconds < 10


def slurm(index: int, port: int) -> dict[str, str]:
    """As `srun` sets them in a job of two tasks."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(port),
    }


def open_mpi(index: int, port: int) -> dict[str, str]:
    """As `mpirun` of Open MPI 4 sets them."""
    return {
        "OMPI_MCA_orte_hnp_uri": "1.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "JAX_COORDINATOR_PORT": str(port),
    }


def tpu_on_kubernetes(index: int, port: int) -> dict[str, str]:
    """As GKE sets them in the pods of a TPU slice."""
    return {
        "TPU_WORKER_ID": str(index),
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "METADATA": json.dumps({"tpu-env": ""}),
        "JAX_COORDINATOR_PORT": str(port),
    }


def tpu_metadata(index: int, port: int) -> dict[str, str]:
    """Where the metadata server says who is who; `METADATA` stands for it in `JOINS`."""
    told = {
        "agent-worker-number": str(index),
        "worker-network-endpoints": "unknown:8470:127.0.0.1,unknown:8470:127.0.0.1",
        "tpu-env": "WORKER_ID: '0'",
    }
    return {"METADATA": json.dumps(told), "JAX_COORDINATOR_PORT": str(port)}


def jobset(index: int, port: int) -> dict[str, str]:
    """What the JobSet of `examples/launch` gives pod `index`, but for its size and DNS name."""
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (replicated,) = job["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value", str(index)) for entry in container["env"]}
    return variables | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }


JOINS = """
import json, os, sys
from jax._src.clusters import cloud_tpu_cluster as tpu
if "METADATA" in os.environ:
    told = json.loads(os.environ["METADATA"])
    tpu.get_metadata = lambda key: (told.get(key, ""), 200 if key in told else 404)
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # libtpu's, where there is no TPU
    tpu.running_in_cloud_tpu_vm = True
from assay.train.processes import is_first, join
join(*sys.argv[1:])
import jax
print(jax.process_index(), jax.process_count(), jax.device_count(), is_first())
"""


@pytest.mark.parametrize(
    ("told", "arguments"),
    [
        pytest.param(slurm, ["auto"], id="slurm"),
        pytest.param(tpu_metadata, ["auto"], id="tpu-metadata"),
        pytest.param(jobset, [], id="jobset"),
        pytest.param(tpu_on_kubernetes, ["auto"], id="gke", marks=pytest.mark.slow),
        pytest.param(open_mpi, ["auto"], id="open-mpi", marks=pytest.mark.slow),
    ],
)
def test_two_processes_find_each_other(told, arguments):
    """By what each launcher tells them, on this machine's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", JOINS, *arguments],
            env=os.environ | told(index, port) | {"XLA_FLAGS": ""},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    ends = [process.communicate(timeout=300) for process in both]
    for index, (output, errors) in enumerate(ends):
        assert output.split() == [str(index), "2", "2", str(index == 0)], errors


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((None, 2, 0), "they need --coordinator"),
        (("localhost", 2, 0), "expected HOST:PORT"),
        (("http://localhost:1234", 2, 0), "expected HOST:PORT"),
        (("localhost:0", 2, 0), "port 0, legal are 1 to 65535"),
        (("[::1]:65536", 2, 0), "port 65536, legal are 1 to 65535"),
        (("localhost:1234", 0, 0), "--processes: found 0"),
        (("localhost:1234", None, 0), "set JAX_NUM_PROCESSES"),
        (("localhost:1234", 2, 2), "legal are 0 to 1"),
    ],
)
def test_what_is_missing_is_named(given, says, monkeypatch):
    for variable in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(AssayError, match=says):
        processes.join(*given)


def test_a_taken_port_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AssayError, match="cannot be listened at here"):
            processes.join(where, 2, 0)


WAITS = """
import sys
from assay.train import processes
processes.WAITING, processes.MEETING = 1, 3
processes.join("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
"""


def test_nobody_comes():
    """It is said what is waited for, and that they did not meet; status 2, and no C++ in sight."""
    alone = []
    for index in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        process = subprocess.Popen(
            [sys.executable, "-c", WAITS, port, str(index)], stderr=subprocess.PIPE, text=True
        )
        alone.append((process, port))
    for index, (process, port) in enumerate(alone):
        _, errors = process.communicate(timeout=60)
        told, ended = errors.splitlines()
        assert told == f"assay: waiting for 2 processes at 127.0.0.1:{port}, at most 3 s."
        assert "the processes did not meet within 3 s" in ended
        assert f"this is process {index} of 2" in ended
        assert process.returncode == 2


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
    # ---- of the held-out text too
    whole = [*loader.evaluation_batches(prepared, 8)]
    part = [*loader.evaluation_batches(prepared, 8, rows=[2, 3, 6, 7])]
    assert len(part) == len(whole)
    for ours, all_rows in zip(part, whole, strict=True):
        for name, array in ours.items():
            np.testing.assert_array_equal(array, all_rows[name][[2, 3, 6, 7]])


# ---------------------------------------------------------------------------- files to launch it

STAND_INS = {
    "assay": 'printf "%s\\0" "$@" >> "$CALLED"; printf "\\n" >> "$CALLED"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'printf "scontrol\\0%s\\0" "$@" >> "$CALLED"; printf "\\n" >> "$CALLED"',
    "gcloud": 'for word; do [[ $word == --command=* ]] && bash -c "${word#--command=}"; done',
}
"""What the files call, in as many words as they need of it."""


def jobset_script() -> str:
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (replicated,) = job["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return container["args"][0].replace("/runs/", "runs/")


def skypilot_script() -> str:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    return task["run"].replace("/runs/", "runs/")


SCRIPTS = {
    "slurm": lambda: (LAUNCH / "slurm.sh").read_text(),
    "jobset": jobset_script,
    "skypilot": skypilot_script,
    "tpu-pod": lambda: (LAUNCH / "tpu-pod.sh").read_text(),
}


def called_by(name: str, folder: Path, **variables: str) -> list[list[str]]:
    """The commands that a launch file runs, in a folder of its own."""
    programs, called = folder / "bin", folder / "called"
    if not programs.is_dir():
        programs.mkdir(parents=True)
        for program, body in STAND_INS.items():
            (programs / program).write_text(f"#!/bin/bash\n{body}\n")
            (programs / program).chmod(0o755)
        for place in (folder / ".venv", folder / "assay" / ".venv"):
            place.mkdir(parents=True)
            (place / "bin").symlink_to(programs)
    called.unlink(missing_ok=True)
    subprocess.run(
        ["bash", "-c", SCRIPTS[name]()],
        cwd=folder,
        env=os.environ
        | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLED": str(called), "HOME": str(folder)}
        | {"SLURM_JOB_ID": "7", "TPU": "pod", "ZONE": "z", "OUT": "runs/llama-3-8b"}
        | {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NUM_NODES": "4", "SKYPILOT_NODE_RANK": "0"}
        | variables,
        check=True,
    )
    return [line.split("\0")[:-1] for line in called.read_text().splitlines()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_it_runs_is_a_run(name, tmp_path, assay_command, monkeypatch):
    """Begun where there is none, gone on with where there is one; as `assay train` reads it."""
    from assay import api

    begun = []

    def begin(run, out, **options):
        begun.append((run, options))
        raise SystemExit

    monkeypatch.setattr(processes, "join", lambda *told: begun.append(told))
    monkeypatch.setattr(api, "train", begin)
    monkeypatch.chdir(tmp_path)
    first, *more = called_by(name, tmp_path)
    assay_command(*first)
    (coordinator, *_), (run, options) = begun
    assert coordinator == ("auto" if name in ("slurm", "tpu-pod") else None)
    assert run.preset == "llama-3-8b"
    assert run.mesh.fsdp == run.mesh.devices in (32, 64)
    assert not options["resume"]
    assert more == ([["scontrol", "requeue", "scontrol", "7"]] if name == "slurm" else [])
    # ---- again
    out = tmp_path / first[first.index("--out") + 1]
    out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"spec": run.model_dump(mode="json")}))
    (out / "result.json").touch()
    first, *more = called_by(name, tmp_path)
    assert not more
    assay_command(*first)
    again, options = begun[-1]
    assert again == run
    assert options["resume"]


@pytest.mark.parametrize("count", ["x", "0", "-1", ""])
def test_the_local_script_needs_a_number(count):
    done = subprocess.run([LAUNCH / "local.sh", count, "nano"], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"found '{count}', expected a number of at least 1" in done.stderr
    assert "unbound" not in done.stderr


@pytest.mark.parametrize(("status", "again"), [(2, False), (127, False), (3, True)])
def test_the_local_script_says_to_resume_only_what_ran(status, again):
    done = subprocess.run(
        [LAUNCH / "local.sh", "2", "nano"], capture_output=True, text=True,
        env=os.environ | {"ASSAY": f"eval exit {status};"},
    )  # fmt: skip
    assert done.returncode == status
    assert f"a process ended with status {status}, so the run ends." in done.stderr
    assert ("--resume" in done.stderr) == again


def test_a_mesh_that_leaves_a_process_out_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(AssayError, match=r"it has 1 device, but 2 processes have 8, and each"):
        train(presets.get("tiny-gpt").run, tmp_path)


def test_several_are_told_to_start_all_again(monkeypatch):
    from assay.cli.train import _what_next
    from assay.train.loop import TrainResult

    ended = TrainResult("runs/a b", *[None] * 9, finished=False, stopped_by="SIGTERM")
    assert _what_next(ended) == "\nTo go on: assay train --resume --out 'runs/a b'"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "start all 2 processes again: assay train --resume" in _what_next(ended)


@pytest.mark.parametrize("name", ["local.sh", "slurm.sh", "tpu-pod.sh"])
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert os.access(LAUNCH / name, os.X_OK)


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


def test_skypilot_starts_a_process_a_node():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    known = {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}
    assert task.keys() == known
    variables = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    variables["SKYPILOT_NODE_RANK"] = "1"
    exports = "\n".join(line for line in task["run"].splitlines() if "export" in line)
    exports += "\necho $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"
    shown = subprocess.run(
        ["bash", "-c", exports],
        env=os.environ | variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.split() == ["10.0.0.1:8476", "2", "1"]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: another task died"), True),
        (jax.errors.JaxRuntimeError(""), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), False),
        (ValueError("no such thing"), False),
        (AssayError("data: none"), False),
    ],
    ids=["task", "silent", "gloo", "memory", "argument", "value", "sentence"],
)
def test_a_process_is_lost_only_where_it_is_not_our_own_fault(monkeypatch, error, lost):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert (processes.another_lost(error) is not None) == lost
    above = RuntimeError("a save failed")
    above.__cause__ = error
    assert (processes.another_lost(above) is not None) == lost
