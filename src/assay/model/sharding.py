"""The one place where a parameter is made, and the one table from logical names to mesh axes.

Every parameter is declared once, with its shape, the logical name of each axis, and how it
begins. A sharding strategy is then a table of names, `RULES`, and the model never mentions it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32, Key

from assay.errors import AssayError
from assay.spec.model import WeightInit
from assay.spec.run import MeshSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor")
"""From far to near: devices next to each other differ along the last."""

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "expert": ("expert",),
    # activations
    "batch": ("data", "fsdp", "expert"),
    "rows": ("data", "fsdp"),  # of the batch, where each expert has its own
}
"""Logical axis -> mesh axes. A name that is not here is not split."""

WHOLE_IF_UNEVEN = {"vocab"}
"""Axes that are left whole by a mesh that does not divide them; any other is refused."""


def parameter(
    key: Key[Array, ""],
    shape: Sequence[int],
    axes: Sequence[str | None],
    init: WeightInit,
    *,
    scale: float = 1.0,
) -> nnx.Param:
    """A float32 parameter. `axes` names each axis; (fan_in, fan_out) are the last two.

    `scale` multiplies the initial values (GPT-2's depth scaling).
    """
    assert len(shape) == len(axes)
    return nnx.Param(initial_values(key, tuple(shape), init, scale), axes=tuple(axes))


def constant_parameter(shape: Sequence[int], axes: Sequence[str | None], value: float) -> nnx.Param:
    """A float32 parameter that begins at one value: biases at 0, norm scales at 1."""
    return nnx.Param(jnp.full(tuple(shape), value, jnp.float32), axes=tuple(axes))


def kind_of(axes: Sequence[str | None]) -> str:
    """What a parameter with these axes is: a matrix, a table, a vector or a balance.

    A matrix maps features to features; a table has a row for each token or position.
    """
    if tuple(axes) == ("balance",):
        return "balance"
    if axes[0] == "expert":  # a batch of parameters, one an expert
        axes = axes[1:]
    if len(axes) < 2:
        return "vector"
    return "table" if "vocab" in axes or axes[0] is None else "matrix"


def deviation(init: WeightInit, fan_in: int, fan_out: int) -> float:
    """The standard deviation that initial values are drawn with."""
    match init.kind:
        case "zero":
            return 0.0
        case "xavier":
            return math.sqrt(2 / (fan_in + fan_out))
        case "fan_in":
            return init.gain / math.sqrt(fan_in)
    return init.std


def initial_values(
    key: Key[Array, ""], shape: tuple[int, ...], init: WeightInit, scale: float = 1.0
) -> Float32[Array, "..."]:
    """Initial values of one matrix, (..., fan_in, fan_out), times `scale`."""
    if init.kind == "zero":
        return jnp.zeros(shape, jnp.float32)
    std, bound = deviation(init, *shape[-2:]), None
    if init.kind == "truncated_normal":
        bound = init.bound
    uniform = getattr(init, "distribution", None) == "uniform"
    std *= math.sqrt(3) if uniform else 1.0
    return _drawn(key, shape, uniform, bound, np.float32(std), np.float32(scale))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _drawn(key, shape, uniform, bound, std, scale):
    """In one pass over the memory, compiled once for all matrices of a shape."""
    if uniform:
        x = jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
    elif bound is not None:
        x = jax.random.truncated_normal(key, -bound, bound, shape, jnp.float32)
    else:
        x = jax.random.normal(key, shape, jnp.float32)
    return scale * (std * x)


# ---------------------------------------------------------------------------- meshes


def make_mesh(spec: MeshSpec, *, of_one: bool = False) -> Mesh | None:
    """The mesh over the first devices; None where the spec asks for one device only.

    With `of_one` that is a mesh too: what says where arrays lie needs one.

    Raises:
        AssayError: if there are fewer devices than the mesh needs.
    """
    if spec.devices == 1 and not of_one:
        return None
    found = jax.device_count()
    if spec.devices > found:
        raise AssayError(
            f"mesh: {', '.join(f'{axis}={getattr(spec, axis)}' for axis in MESH_AXES)} needs "
            f"{spec.devices} devices; found {found} ({jax.default_backend()}). Start all processes "
            f"of a run that had several, or name a mesh of what is here, as --mesh data=1."
        )
    shape = tuple(getattr(spec, axis) for axis in MESH_AXES)
    kinds = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=jax.devices()[: spec.devices])


@contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[Mesh | None]:
    """Within it, `constrain` means this mesh; None is one device, and changes nothing."""
    if mesh is None:
        yield None
        return
    with jax.set_mesh(mesh):
        yield mesh


def partition(axes: Sequence[str | None]) -> P:
    """The mesh axes of an array whose axes have these logical names."""
    return P(*(RULES.get(name) if name else None for name in axes))


def parameter_shardings(model: nnx.Module, mesh: Mesh):
    """A NamedSharding for every parameter of a (possibly abstract) model, as a pure dict.

    Raises:
        AssayError: if an axis does not divide, naming the parameter, its size and the mesh axis.
    """
    shardings = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        shape, axes = param.shape, param.axes
        axes = (None,) * (len(shape) - len(axes)) + axes  # stacked layers have one more in front
        split = []
        for size, name in zip(shape, axes, strict=True):
            ways = math.prod(mesh.shape[axis] for axis in RULES.get(name, ()))
            if size % ways and name not in WHOLE_IF_UNEVEN:
                where = ".".join(map(str, path))
                raise AssayError(
                    f"mesh: {'x'.join(RULES[name])}={ways} does not divide the {size} of axis "
                    f"'{name}' of {where} {tuple(shape)}."
                )
            split.append(None if size % ways else name)
        shardings[path] = NamedSharding(mesh, partition(split))
    return nnx.traversals.unflatten_mapping(shardings)


def constrain(x: Array, *axes: str | None) -> Array:
    """Pins an activation's sharding inside jit, where a mesh is set; elsewhere nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes))


def table_rows(table: nnx.Param, places: Int32[Array, "..."]) -> Float32[Array, "..."]:
    """table[places], (V, D) and (...) -> (..., D), the rows made whole first, as FSDP has it.

    XLA's partitioner otherwise splits what is looked up along D, and then must undo that.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table[...][places]
    name = table.axes[0]
    ways = math.prod(mesh.shape[axis] for axis in RULES.get(name, ()))
    return constrain(table[...], None if table.shape[0] % ways else name, None)[places]


def on_each_device(f: Callable, *axes: Sequence[str | None] | list, out: Sequence[str | None]):
    """`f` as every device runs it on its own part, where a mesh is set; elsewhere `f` itself.

    `axes` are the logical axes of each argument (of each leaf, in a list, where the argument is a
    list of arrays), `out` those of the result. What crosses devices in between, `f` says.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return f
    in_specs = tuple(
        [partition(leaf) for leaf in entry] if isinstance(entry, list) else partition(entry)
        for entry in axes
    )
    return jax.shard_map(f, in_specs=in_specs, out_specs=partition(out), check_vma=False)


def batch_shards() -> int:
    """Among how many devices the rows of a batch are shared; 1 where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def on_batch_shards(f: Callable, *, whole: int, rows: int) -> Callable:
    """`f(*whole, *rows) -> (whole, rows)` as each shard of the batch runs it on its own rows.

    Along `tensor` the partitioner goes on as elsewhere. Without a mesh it is `f` itself.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return f
    everywhere, split = P(), partition(("batch",))
    return jax.shard_map(
        f,
        in_specs=(everywhere,) * whole + (split,) * rows,
        out_specs=(everywhere, split),
        axis_names=set(RULES["batch"]),
        check_vma=False,
    )


def summed_over_batch(tree):
    """Inside `on_batch_shards`: each array summed over all shards of the batch."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.psum(tree, RULES["batch"])
