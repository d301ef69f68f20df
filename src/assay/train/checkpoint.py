"""Checkpoints by Orbax: written beside the training, whole or not at all.

A checkpoint names every array by layer (`params/layers.0.attention.q.w`), so it does not depend
on how the run keeps its layers (scanned or not) or on its mesh.

Orbax is imported where it is first used: a run does that while its step is being compiled.
"""

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from assay.errors import AssayError
from assay.model.transformer import Layout, name_leaves, unname
from assay.train import processes
from assay.train.step import TrainState, split_statistic

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

logging.getLogger("absl").setLevel(logging.WARNING)


class NotSavedError(AssayError):
    """Something of the run could not be written. Writes beside it may yet be failing."""


class NoRoomError(AssayError):
    """There is no room for a checkpoint, and none was begun."""


class Checkpoints:
    """The `checkpoints/` folder of a run; `keep` is how many are left standing.

    What could not be written is told by the next call of any kind: a `NotSavedError`.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder
        self._manager = _manager(folder, max_to_keep=keep, create=True)
        self._waited = False

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: Any, layout: Layout, extra: dict) -> None:
        """Takes the state as it is and writes it in the background. `position` is the data's.

        Raises:
            NoRoomError: if there is no room for it.
            NotSavedError: if the one before could not be written.
        """
        import orbax.checkpoint as ocp

        self.wait()  # until then the one before needs room beside those that it takes the place of
        need_room(self.folder, state, self._whole())
        step, arrays = int(state.step), safe_from_the_next_step(state, layout)
        with self._told():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays),
                    data=ocp.args.JsonSave({"position": position, **extra}),
                ),
            )

    def restore(self, step: int, like: TrainState, layout: Layout) -> tuple[TrainState, dict]:
        """The state saved at a step, in the form and placing of `like`, and what went with it.

        Raises:
            AssayError: if the checkpoint is of another architecture or optimizer.
        """
        import orbax.checkpoint as ocp

        wanted = flatten_state(like, layout)
        found = {name: tuple(leaf.shape) for name, leaf in _leaves(self._manager, step).items()}
        for name, leaf in wanted.items():
            if name not in found:
                raise AssayError(
                    f"checkpoint {step}: it is of another architecture or optimizer: "
                    f"'{name}' is not in it."
                )
            if found[name] != tuple(leaf.shape):
                raise AssayError(
                    f"checkpoint {step}: it is of another architecture: '{name}' has shape "
                    f"{found[name]}, but the run's has {tuple(leaf.shape)}."
                )
        surplus = found.keys() - wanted.keys()
        if surplus:
            raise AssayError(
                f"checkpoint {step}: it is of another architecture or optimizer: it holds "
                f"'{min(surplus)}', which the run does not have."
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=_placed(wanted), data=ocp.args.JsonRestore()),
        )
        state = unflatten_state(like, restored.state, layout)
        placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), state, like)
        return placed, restored.data

    def wait(self) -> None:
        """Until what was saved is on disk."""
        with self._told():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._told():
            self._manager.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            if jax.process_count() == 1:
                yield
            else:
                with processes.after(processes.HEARTBEAT / 2, self._waiting):
                    yield
        except Exception as error:
            why = _refusal(error)
            if why is None:  # not the disk's: of a device, or of a process that is gone
                raise
            raise NotSavedError(
                f"{self.folder}: a checkpoint could not be written: {why}. {self._whole()}"
            ) from error

    def _waiting(self) -> None:
        """Said beforehand: at a barrier JAX ends the process from C++, and nothing follows."""
        if self._waited:
            return
        self._waited = True
        print(
            f"assay: a checkpoint in {self.folder} is still being written, or another process was "
            f"lost: then JAX ends this one within {processes.HEARTBEAT} s, with words of its own; "
            f"start all of them again with --resume.",
            file=sys.stderr,
            flush=True,
        )

    def _whole(self) -> str:
        latest = self.latest()
        if latest is None:
            return "None was saved before."
        return f"That of step {latest} is whole: --resume goes on from there."


def need_room(folder: Path, state: TrainState, more: str = "") -> None:
    """Asks the first process, for the folder is one for all; `state` may be shapes.

    Raises:
        NoRoomError: in every process, if the disk has less room than the state takes. `more` ends
            the message.
    """

    def ask() -> None:
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(folder).free
        if size > free:
            raise NoRoomError(
                f"{folder}: a checkpoint takes {size / 1e6:,.1f} MB, but its disk has "
                f"{free / 1e6:,.1f} MB left. {more}".rstrip()
            )

    processes.all_or_none(lambda: ask() if processes.is_first() else None)


def _refusal(error: Exception) -> str | None:
    """In the system's words, why it would not write; TensorStore gives them by their number."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(int(number[1]))
    return error.strerror if isinstance(error, OSError) else None


def restore_parameters(
    folder: Path,
    step: int | None = None,
    places: Mapping[str, jax.sharding.Sharding] | None = None,
) -> tuple[dict[str, jax.Array], int]:
    """Only the named parameters of a run's checkpoint (the newest), and its step.

    Each is read straight to its place, the first device where none is given.

    Raises:
        AssayError: if the folder holds none.
    """
    import orbax.checkpoint as ocp

    manager = _manager(folder)
    step = manager.latest_step() if step is None else step
    if step is None:
        raise AssayError(f"{folder}: there is no checkpoint in it.")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=places[name.removeprefix("params/")] if places else here,
        )
        for name, leaf in _leaves(manager, step).items()
        if name.startswith("params/")
    }
    args = ocp.args.Composite(state=_placed(wanted, partial_restore=True))
    restored = manager.restore(step, args=args)
    manager.close()
    return {name.removeprefix("params/"): leaf for name, leaf in restored.state.items()}, step


def _manager(folder: Path, **options: Any) -> "ocp.CheckpointManager":
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
        },
    )


def _leaves(manager: "ocp.CheckpointManager", step: int) -> dict[str, Any]:
    """Shapes and dtypes in a checkpoint, without reading it."""
    return dict(manager.item_metadata(step)["state"].tree)


def _placed(like: dict[str, Any], **options: Any) -> "ocp.args.PyTreeRestore":
    """Asks for arrays of these shapes, each straight to its place."""
    import orbax.checkpoint as ocp

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in like.items()}
    places = {name: ocp.ArrayRestoreArgs(sharding=x.sharding) for name, x in like.items()}
    return ocp.args.PyTreeRestore(shapes, restore_args=places, **options)


def safe_from_the_next_step(state: TrainState, layout: Layout) -> dict[str, jax.Array]:
    """The named state, in buffers that the next step does not give away while it is written.

    What an accelerator holds Orbax copies to the host before `save` returns. What is in the
    host's memory it reads in place, later: that is copied, unless it was cut from a stack of
    layers, which is a copy already.
    """
    own = {id(leaf) for leaf in jax.tree.leaves(state)}

    def safe(name: str, leaf: jax.Array) -> jax.Array:
        small = name in ("step", "key")
        return jnp.copy(leaf) if small or (id(leaf) in own and _on_host(leaf)) else leaf

    return {name: safe(name, leaf) for name, leaf in flatten_state(state, layout).items()}


def _on_host(leaf: jax.Array) -> bool:
    device = next(iter(leaf.sharding.device_set))
    return device.platform == "cpu" or leaf.sharding.memory_kind not in (None, "device")


# ---------------------------------------------------------------------------- names


def flatten_state(state: TrainState, layout: Layout) -> dict[str, jax.Array]:
    """Every array of the state under a name that does not depend on how layers are kept."""
    named = {f"params/{k}": v for k, v in name_leaves(state.params, layout).items()}
    for prefix, tree in _optimizer_trees(state).items():
        named |= {f"{prefix}/{k}": v for k, v in name_leaves(tree, layout).items()}
    return named | {"step": state.step, "key": jax.random.key_data(state.key)}


def unflatten_state(like: TrainState, named: dict, layout: Layout) -> TrainState:
    """The inverse, in the form of `like`."""

    def part(prefix: str, tree: dict) -> dict:
        inner = {
            name.removeprefix(f"{prefix}/"): leaf
            for name, leaf in named.items()
            if name.startswith(f"{prefix}/")
        }
        return unname(tree, inner, layout)

    trees = {prefix: part(prefix, tree) for prefix, tree in _optimizer_trees(like).items()}
    return TrainState(
        params=part("params", like.params),
        optimizer=_with_optimizer_trees(like, trees),
        step=named["step"],
        key=jax.random.wrap_key_data(named["key"]),
    )


def _place(path: tuple) -> tuple[str, tuple]:
    prefix, of = split_statistic(path)
    return "optimizer" + prefix, of or ("value",)


def _optimizer_trees(state: TrainState) -> dict[str, dict]:
    """The optimizer's statistics, each a dict in the form of the parameters (or a part of it)."""
    trees: dict[str, dict] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.optimizer)[0]:
        prefix, of = _place(path)
        trees.setdefault(prefix, {})[of] = leaf
    return {prefix: nnx.traversals.unflatten_mapping(flat) for prefix, flat in trees.items()}


def _with_optimizer_trees(like: TrainState, trees: dict[str, dict]):
    leaves, structure = jax.tree_util.tree_flatten_with_path(like.optimizer)
    new = []
    for path, _ in leaves:
        prefix, of = _place(path)
        node = trees[prefix]
        for part in of:
            node = node[part]
        new.append(node)
    return jax.tree_util.tree_unflatten(structure, new)


def write_json(path: Path, data: Any) -> None:
    """Writes a JSON file whole or not at all."""
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(json.dumps(data, indent=2) + "\n")
    new.replace(path)
