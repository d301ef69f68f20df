"""TensorBoard and Weights & Biases, fed with the lines of `metrics.jsonl`."""

from pathlib import Path
from typing import Any

from assay.errors import AssayError, did_you_mean, need_extra
from assay.spec.run import RunSpec

TRACKERS = ("tensorboard", "wandb")

NAMES = {
    # ours -> what people's dashboards expect
    "loss": "train/loss",
    "objective": "train/objective",
    "bpb": "train/bpb",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens": "train/tokens",
    "tokens_per_second": "train/tokens_per_second",
    "val_loss": "val/loss",
    "val_bpb": "val/bpb",
}


class Tracker:
    """Writes to each of the named trackers; with none, does nothing.

    TensorBoard's files lie in `OUT/tensorboard`, W&B's in `OUT/wandb`: `WANDB_MODE=offline` keeps
    them there until `wandb sync`. A run that goes on after `step` goes on as the same one: what
    TensorBoard was told of later steps is void, and W&B gets the same id.

    Raises:
        AssayError: if a tracker is unknown or its package is not installed.
    """

    def __init__(self, out: Path, run: RunSpec, names: tuple[str, ...], step: int = 0):
        self.writers: list[Any] = []
        self.wandb = None
        for name in names:
            if name not in TRACKERS:
                raise AssayError(f"'{name}' is not a tracker; {did_you_mean(name, TRACKERS)}")
        if "tensorboard" in names:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise need_extra("tensorboardX", "track", "Writing TensorBoard files") from None
            named = {"filename_suffix": f".{step:09d}"}  # else two of one second are one file
            purged = {"purge_step": step + 1} if step else {}
            self.writers.append(SummaryWriter(str(out / "tensorboard"), **named, **purged))
        if "wandb" in names:
            try:
                import wandb
            except ImportError:
                raise need_extra("wandb", "track", "Logging to Weights & Biases") from None
            about = out / "wandb" / "id"
            same = {"id": about.read_text(), "resume": "allow"} if about.is_file() else {}
            (out / "wandb").mkdir(parents=True, exist_ok=True)  # else it takes another folder
            self.wandb = wandb.init(
                project="assay",
                name=out.name,
                dir=str(out),
                config=run.model_dump(mode="json"),
                **same,
            )
            about.write_text(self.wandb.id)

    def write(self, record: dict[str, Any]) -> None:
        step = record["step"]
        scalars = {
            NAMES[name]: number
            for name, number in record.items()
            if name in NAMES and number is not None
        }
        for writer in self.writers:
            for name, number in scalars.items():
                writer.add_scalar(name, number, step)
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
        if self.wandb is not None:
            self.wandb.finish()
