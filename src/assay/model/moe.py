"""Mixture of experts: route -> dispatch -> experts -> combine.

Routing is the architecture's and always in float32. Dispatch is how tokens get to their experts,
chosen by `ComputeSpec.moe_dispatch`; outputs and gradients are the same for all:

- dense: every expert computes every token. The reference, E / k times the work.
- ragged: choices sorted by expert, one `jax.lax.ragged_dot`. For TPU and GPU, and for a CPU where
  `blas.py` has a product for it.
- blocks: choices sorted by expert, each expert's filled up to whole blocks, and a loop over as
  many blocks as there are. For XLA on a CPU, whose `ragged_dot` is slower than dense there.
- capacity: a place for each choice in a buffer of fixed size for each expert. Its size is that of
  the capacity limit; where there is none it must be T, and the work is dense's.

Axes: B batch, T tokens, N = B T, D model, F hidden, E experts, K choices of a token, C capacity
(places an expert has for a row), P places of a layout, G groups of R rows, S slots (soft).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from assay.model import blas
from assay.model.layers import (
    MANY_ROWS,
    PRODUCT,
    Mlp,
    activate,
    along_last,
    glu,
    use_cpu_kernels,
)
from assay.model.sharding import constant_parameter, constrain, on_each_device, parameter
from assay.spec.model import MlpSpec, MoeSpec, RouterSpec, WeightInit
from assay.spec.run import ComputeSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """What one layer's router did. Means are over tokens that are no padding.

    load: each expert's share of all choices (before any are dropped); a soft mixture's weights.
    entropy: of a token's distribution over experts, in nats.
    dropped: the share of choices that capacity did not let through.
    steer: 0, with each expert's excess load as its gradient by the balancing bias.
    experts, kept: the choices, and which came through. An expert-choice token "chooses" all
    experts, and is kept by some; a soft one has no choices.
    margin: how far the last choice's score is above the first that was not made.
    """

    load: Float32[Array, "e"]
    entropy: Float32[Array, ""]
    dropped: Float32[Array, ""]
    balance_loss: Float32[Array, ""]
    z_loss: Float32[Array, ""]
    steer: Float32[Array, ""]
    experts: Int32[Array, "b t k"]
    kept: Bool[Array, "b t k"]
    margin: Float32[Array, "b t"]


# ---------------------------------------------------------------------------- route


def router_logits(
    x: Float[Array, "b t d"], w: Float32[Array, "d e"], b: Float32[Array, "e"] | None = None
) -> Float32[Array, "b t e"]:
    """x w + b, in float32 on every device (a TPU's default would round the factors)."""
    y = jnp.einsum("btd,de->bte", x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
    return y if b is None else y + along_last(b, y)


def choose(
    scores: Float32[Array, "b t e"], k: int
) -> tuple[Int32[Array, "b t k"], Float32[Array, "b t"]]:
    """The k experts of the largest scores, the best first; and by how much the last one won."""
    more = min(k + 1, scores.shape[-1])
    values, experts = jax.lax.top_k(jax.lax.stop_gradient(scores), more)
    margin = (
        values[..., k - 1] - values[..., k] if more > k else jnp.full(values.shape[:2], jnp.inf)
    )
    return experts[..., :k], margin


def normalised(weights: Float32[Array, "b t k"]) -> Float32[Array, "b t k"]:
    """Weights as shares of their sum."""
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)


def noisy(
    logits: Float32[Array, "b t e"], spread: Float32[Array, "b t e"], key: Key[Array, ""]
) -> Float32[Array, "b t e"]:
    """logits + eps softplus(spread), eps ~ N(0, 1) (arXiv:1701.06538, equation 4)."""
    return logits + jax.random.normal(key, logits.shape) * jax.nn.softplus(spread)


def expert_choice(
    scores: Float32[Array, "b t e"], capacity: int, real: Bool[Array, "b t"]
) -> Bool[Array, "b t e"]:
    """Which tokens each expert takes: the `capacity` with its largest scores in each row."""
    scores = jnp.where(real[..., None], jax.lax.stop_gradient(scores), -jnp.inf)
    _, tokens = jax.lax.top_k(scores.swapaxes(1, 2), capacity)  # (B, E, C)
    rows = jnp.arange(scores.shape[0])[:, None, None]
    experts = jnp.arange(scores.shape[2])[None, :, None]
    taken = jnp.zeros(scores.shape, bool).at[rows, tokens, experts].set(True)
    return taken & real[..., None]


def places_per_row(load: float, choices: float, tokens: int, experts: int) -> int:
    """C: `load` times the mean number of choices that an expert gets from a row of T tokens."""
    return max(1, min(tokens, -int(-load * choices * tokens // experts)))


def within_capacity(
    experts: Int32[Array, "b t k"],
    weights: Float32[Array, "b t k"],
    kept: Bool[Array, "b t k"],
    *,
    num_experts: int,
    capacity: int,
    by_weight: bool,
) -> Bool[Array, "b t k"]:
    """The choices, of those kept so far, that find a place: `capacity` an expert and row.

    In the order of the row, all choices of a token before those of the next: no later token
    matters. (All first choices before all second ones would leak; so does `by_weight`, which
    gives places to the largest weights.)
    """
    flat = jnp.where(kept, experts, num_experts).reshape(experts.shape[0], -1)
    priority = -jax.lax.stop_gradient(weights).reshape(flat.shape) if by_weight else None
    place = rank(flat, num_experts + 1, priority).reshape(experts.shape)
    return kept & (place < capacity)


def rank(
    groups: Int32[Array, "b m"], num_groups: int, priority: Float32[Array, "b m"] | None = None
) -> Int32[Array, "b m"]:
    """The place of each entry among those of its group: lowest priority first, then in order."""
    count = groups.shape[-1]
    if priority is not None:
        order = jnp.lexsort((priority, groups), axis=-1)
    elif (num_groups + 1) * count < 2**31:
        # Group and place in one number: sorting one array takes a TPU's compiler 1.2 s, two 4.6.
        places = jnp.arange(count, dtype=jnp.int32)[None]
        order = jnp.sort(groups * count + places, axis=-1, stable=False) % count
    else:
        order = jnp.argsort(groups, axis=-1, stable=True)
    sizes = group_sizes(groups, num_groups)
    starts = jnp.cumsum(sizes, axis=-1) - sizes
    ordered = jnp.take_along_axis(groups, order, axis=-1)
    places = jnp.arange(count, dtype=jnp.int32)[None]
    places = places - jnp.take_along_axis(starts, ordered, axis=-1)
    rows = jnp.arange(groups.shape[0])[:, None]
    return jnp.zeros_like(groups).at[rows, order].set(places)


def group_sizes(groups: Int32[Array, "b m"], num_groups: int) -> Int32[Array, "b g"]:
    """How many entries each group has; entries outside 0 ... G-1 count nowhere."""
    of = jnp.arange(num_groups, dtype=groups.dtype)[None, :, None]
    return jnp.sum(groups[:, None, :] == of, axis=-1, dtype=jnp.int32)


# ---------------------------------------------------------------------------- dispatch

LANES = 128
"""Numbers side by side in a TPU's register."""

BLOCK = 128
"""Rows of a block: on two cores 128 to 256 were fastest (benchmarks/moe_dispatch.py)."""


class Layout(NamedTuple):
    """Where choices go, and what a product with expert weights is there.

    slots: the place of each choice, P for one that is not kept.
    shape: (G, R) or (P,), the layout of the P places.
    product: (P..., D), (E, D, F) -> (P..., F).
    spread: (E, F) -> what broadcasts over (P..., F): a bias to its expert's places.
    """

    slots: Int32[Array, "n k"]
    shape: tuple[int, ...]
    product: Callable[[Array, Array], Array]
    spread: Callable[[Array], Array]

    @property
    def places(self) -> int:
        return self.shape[0] * (self.shape[1] if len(self.shape) > 1 else 1)


def dispatch(x: Float[Array, "n d"], layout: Layout) -> Float[Array, "..."]:
    """Every kept choice's token at its place; zeros at places that are empty."""
    placed = _to_places(x, layout.slots, layout.places)
    return placed.reshape(*layout.shape, x.shape[-1])


def dispatch_choices(x: Int32[Array, "n k"], layout: Layout) -> Int32[Array, "..."]:
    """A number of every kept choice at its place; 0 at places that are empty."""
    placed = jnp.zeros((layout.places,), x.dtype)
    return placed.at[layout.slots.reshape(-1)].set(x.reshape(-1), mode="drop").reshape(layout.shape)


def combine(
    y: Float[Array, "..."], layout: Layout, weights: Float32[Array, "n k"]
) -> Float[Array, "n d"]:
    """The weighted sum of what a token's experts made of it, in float32.

    A choice that was not kept reads nobody's output: it adds nothing.
    """
    return _from_places(y.reshape(layout.places, -1), layout.slots, weights)


# A place holds one choice and a choice has one place, so the gradient of fetching rows is to fetch
# rows too. Autodiff would add them up by a scatter, which is slow on every device.


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _to_places(x: Float[Array, "n d"], slots: Int32[Array, "n k"], places: int):
    return _rows(x, _token_at(slots, places))


def _to_places_backward(places, slots, g):
    total = sum(_rows(g, slots[:, k]).astype(jnp.float32) for k in range(slots.shape[1]))
    return total.astype(g.dtype), None


_to_places.defvjp(
    lambda x, slots, places: (_to_places(x, slots, places), slots), _to_places_backward
)


@jax.custom_vjp
def _from_places(
    y: Float[Array, "p d"], slots: Int32[Array, "n k"], weights: Float32[Array, "n k"]
) -> Float[Array, "n d"]:
    chosen = (_rows(y, slots[:, k]).astype(jnp.float32) for k in range(slots.shape[1]))
    return sum(rows * weights[:, k, None] for k, rows in enumerate(chosen)).astype(y.dtype)


def _from_places_backward(saved, g):
    y, slots, weights = saved
    places = y.shape[0]
    weight_at = jnp.zeros((places,), jnp.float32)
    weight_at = weight_at.at[slots.reshape(-1)].set(weights.reshape(-1), mode="drop")
    dy = _rows(g, _token_at(slots, places)).astype(jnp.float32) * weight_at[:, None]
    chosen = (_rows(y, slots[:, k]).astype(jnp.float32) for k in range(slots.shape[1]))
    d_weights = [jnp.sum(rows * g.astype(jnp.float32), axis=-1) for rows in chosen]
    return dy.astype(y.dtype), None, jnp.stack(d_weights, axis=-1)


_from_places.defvjp(
    lambda y, slots, weights: (_from_places(y, slots, weights), (y, slots, weights)),
    _from_places_backward,
)


def _token_at(slots: Int32[Array, "n k"], places: int) -> Int32[Array, "p"]:
    """The token at each place, N where it is empty."""
    n, k = slots.shape
    tokens = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], (n, k))
    empty = jnp.full((places,), n, jnp.int32)
    return empty.at[slots.reshape(-1)].set(tokens.reshape(-1), mode="drop")


def _rows(x: Float[Array, "m d"], at: Int32[Array, "p"]) -> Float[Array, "p d"]:
    """x[at], zeros where that is beyond the end.

    Fetched as whole tiles: in bfloat16 a TPU keeps two rows of x in one, and to pick one of them
    takes its compiler 2.7 s for each gather, against 0.7 (layers of experts have 18).
    """
    d = x.shape[-1]
    tiles = (d // LANES, LANES) if d % LANES == 0 else (d,)
    rows = x.reshape(-1, *tiles).at[at].get(mode="fill", fill_value=0)
    return rows.reshape(-1, d)


def capacity_layout(
    experts: Int32[Array, "b t k"],
    kept: Bool[Array, "b t k"],
    num_experts: int,
    capacity: int,
    cpu: bool,
) -> Layout:
    """(E, B C): each row has C places at each expert."""
    b, t, k = experts.shape
    flat = jnp.where(kept, experts, num_experts).reshape(b, -1)
    place = rank(flat, num_experts + 1)
    row = jnp.arange(b, dtype=jnp.int32)[:, None]
    places = num_experts * b * capacity
    slots = jnp.where(flat < num_experts, (flat * b + row) * capacity + place, places)
    product = _cpu_batched if cpu else _batched
    return Layout(
        slots.reshape(b * t, k), (num_experts, b * capacity), product, lambda bias: bias[:, None]
    )


def _batched(x, w):
    return jnp.einsum("gnd,gdf->gnf", x, w)


_cpu_batched = jax.custom_vjp(_batched)


def _cpu_batched_backward(saved, g):
    x, w = saved
    g = jax.lax.optimization_barrier(g)
    return jnp.einsum("gnf,gdf->gnd", g, w), jnp.einsum("gnd,gnf->gdf", x, g)


_cpu_batched.defvjp(lambda x, w: (_batched(x, w), (x, w)), _cpu_batched_backward)


def ragged_layout(
    experts: Int32[Array, "b t k"],
    kept: Bool[Array, "b t k"],
    num_experts: int,
    by_blas: bool = False,
) -> Layout:
    """(N K,): choices sorted by expert, those that are not kept behind all."""
    b, t, k = experts.shape
    flat = jnp.where(kept, experts, num_experts).reshape(1, -1)
    sizes = group_sizes(flat, num_experts)[0]
    ends = jnp.cumsum(sizes)
    starts = jnp.append(ends - sizes, 0)
    place = starts[flat[0]] + rank(flat, num_experts + 1)[0]
    places = b * t * k
    slots = jnp.where(flat[0] < num_experts, place, places)
    owner = jnp.searchsorted(ends, jnp.arange(places), side="right")
    owner = jnp.minimum(owner, num_experts - 1)
    return Layout(
        slots.reshape(b * t, k),
        (places,),
        lambda x, w: (
            checkpoint_name(blas.grouped(x, w, sizes), PRODUCT)
            if by_blas
            else jax.lax.ragged_dot(x, w, sizes)
        ),
        lambda bias: bias[owner],
    )


def device_layout(
    devices: Int32[Array, "b t k"], kept: Bool[Array, "b t k"], ways: int, most: int
) -> Layout:
    """(ways, N most): choices by the device of their expert, at most `most` a token for each."""
    b, t, k = devices.shape
    flat = jnp.where(kept, devices, ways).reshape(1, -1)
    room = b * t * most
    slots = jnp.where(flat < ways, flat * room + rank(flat, ways + 1), ways * room)
    return Layout(slots.reshape(b * t, k), (ways, room), _batched, lambda bias: bias)


def blocks_layout(
    experts: Int32[Array, "b t k"], kept: Bool[Array, "b t k"], num_experts: int
) -> Layout:
    """(G, R): blocks of R places, each of one expert; the blocks in use are the first ones."""
    b, t, k = experts.shape
    choices = b * t * k
    rows = min(BLOCK, max(1, choices // num_experts))  # a few tokens: blocks no larger than needed
    blocks = min(choices, choices // rows + num_experts)
    flat = jnp.where(kept, experts, num_experts).reshape(1, -1)
    sizes = group_sizes(flat, num_experts)[0]
    ends = jnp.cumsum((sizes + rows - 1) // rows)  # in blocks
    starts = jnp.append(0, ends)
    slots = starts[flat[0]] * rows + rank(flat, num_experts + 1)[0]
    slots = jnp.where(flat[0] < num_experts, slots, blocks * rows)
    owner = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    owner = jnp.minimum(owner, num_experts - 1).astype(jnp.int32)
    return Layout(
        slots.reshape(b * t, k),
        (blocks, rows),
        lambda x, w: _block_product(x, w, owner, ends[-1]),
        lambda bias: bias[owner][:, None],
    )


@jax.custom_vjp
def _block_product(
    x: Float[Array, "g r d"],
    w: Float[Array, "e d f"],
    owner: Int32[Array, "g"],
    used: Int32[Array, ""],
) -> Float[Array, "g r f"]:
    """x[i] w[owner[i]] for the first `used` blocks, zeros for the others.

    The loop's trip count is known at run time only, so its gradient is written out.
    """

    def block(i, y):
        return _put(y, _at(x, i) @ _at(w, owner[i]), i)

    y = jnp.zeros((*x.shape[:2], w.shape[-1]), x.dtype)
    return jax.lax.fori_loop(0, used, block, y)


def _block_product_forward(x, w, owner, used):
    return _block_product(x, w, owner, used), (x, w, owner, used)


def _block_product_backward(saved, g):
    x, w, owner, used = saved
    g = jax.lax.optimization_barrier(g)

    def block(i, sums):
        dx, dw = sums
        g_block, expert = _at(g, i)[None], owner[i]
        dx_block = jnp.einsum("brf,df->brd", g_block, _at(w, expert))[0]
        # Three axes: in bfloat16 XLA's CPU backend computes this product slowly with two.
        dw_block = jnp.einsum("brd,brf->df", _at(x, i)[None], g_block)
        dw_expert = _at(dw, expert) + dw_block.astype(jnp.float32)
        return _put(dx, dx_block, i), _put(dw, dw_expert, expert)

    zeros = jnp.zeros_like(x), jnp.zeros(w.shape, jnp.float32)
    dx, dw = jax.lax.fori_loop(0, used, block, zeros)
    return dx, dw.astype(w.dtype), None, None


_block_product.defvjp(_block_product_forward, _block_product_backward)


def _at(x, i):
    return jax.lax.dynamic_index_in_dim(x, i, axis=0, keepdims=False)


def _put(x, value, i):
    return jax.lax.dynamic_update_index_in_dim(x, value, i, axis=0)


# ---------------------------------------------------------------------------- experts


class ExpertLinear(nnx.Module):
    """A weight (E, K, N) and perhaps a bias (E, N)."""

    def __init__(self, key, experts, fan_in, fan_out, *, axes, init, bias, scale=1.0):
        shape = (experts, fan_in, fan_out)
        self.w = parameter(key, shape, ("expert", *axes), init, scale=scale)
        self.b = constant_parameter((experts, fan_out), ("expert", axes[1]), 0.0) if bias else None


class Experts(nnx.Module):
    """E MLPs of one shape, their weights stacked."""

    def __init__(
        self,
        key: Key[Array, ""],
        experts: int,
        d_model: int,
        spec: MlpSpec,
        *,
        init: WeightInit,
        residual_init: WeightInit,
        residual_scale: float,
        cpu: bool,
    ):
        self.activation, self.cpu = spec.activation, cpu
        widths = (d_model, *spec.widths)
        keys = jax.random.split(key, len(widths) + 1)
        self.up = nnx.List(
            ExpertLinear(
                k,
                experts,
                i,
                o,
                axes=("embed" if n == 0 else None, "mlp"),
                init=init,
                bias=spec.bias,
            )
            for n, (k, i, o) in enumerate(zip(keys[2:], widths[:-1], widths[1:], strict=True))
        )
        self.gate = (
            ExpertLinear(
                keys[1],
                experts,
                d_model,
                widths[1],
                axes=("embed", "mlp"),
                init=init,
                bias=spec.bias,
            )
            if spec.gated
            else None
        )
        self.down = ExpertLinear(
            keys[0],
            experts,
            widths[-1],
            d_model,
            axes=("mlp", "embed"),
            init=residual_init,
            scale=residual_scale,
            bias=spec.bias,
        )

    def __call__(
        self, x: Float[Array, "..."], product, spread, across: "Across | None" = None
    ) -> Float[Array, "..."]:
        """(P..., D) -> (P..., D): each place by its own expert, as a `Layout` says.

        Where hidden features are split `across` devices, each gives its part of a sum.
        """

        def linear(x, layer: ExpertLinear):
            y = product(x, layer.w[...].astype(x.dtype))
            return y if layer.b is None else y + spread(layer.b[...].astype(x.dtype))

        def last(x):
            if across is None or self.down.b is None:
                return linear(x, self.down)
            bias = across.once(self.down.b[...])
            return product(x, self.down.w[...].astype(x.dtype)) + spread(bias.astype(x.dtype))

        if self.gate is not None:
            gate, up = linear(x, self.gate), linear(x, self.up[0])
            return last(glu(gate, up, self.activation, cpu=self.cpu))
        for n, up in enumerate(self.up):
            if n and across is not None:
                x = across.whole_features(x)
            x = activate(linear(x, up), self.activation, cpu=self.cpu)
        return last(x)

    def arrays(self) -> tuple[list[Array], list[tuple], Callable[[list[Array]], "Experts"]]:
        """The weights, the logical axes of each, and the way back from (parts of) them.

        On its device a weight is whole along d_model, whoever keeps it.
        """
        leaves, structure = jax.tree.flatten(self)
        params = jax.tree.leaves(self, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
        axes = [tuple(None if a == "embed" else a for a in param.axes) for param in params]
        return leaves, axes, lambda parts: jax.tree.unflatten(structure, parts)


class Across:
    """What goes between devices while each computes its own experts and hidden features."""

    def __init__(self):
        mesh = jax.sharding.get_abstract_mesh()
        self.experts, self.features = mesh.shape["expert"], mesh.shape["tensor"]

    def to_experts(self, x: Array) -> Array:
        """(E, P, ...) of own tokens -> (E / ways, ways P, ...) of own experts."""
        e, p, *rest = x.shape
        x = self._exchanged(x.reshape(self.experts, e // self.experts, p, *rest))
        return jnp.moveaxis(x, 0, 1).reshape(e // self.experts, self.experts * p, *rest)

    def from_experts(self, x: Array) -> Array:
        """The way back."""
        e, p, *rest = x.shape
        x = jnp.moveaxis(x.reshape(e, self.experts, p // self.experts, *rest), 1, 0)
        return self._exchanged(x).reshape(self.experts * e, p // self.experts, *rest)

    def _exchanged(self, x: Array) -> Array:
        """Part i of the first axis to device i, and theirs in its place.

        Not by `tiled` and another axis: a TPU's compiler then took 30 s of CPU time for each
        exchange, to move what lies in tiles.
        """
        return jax.lax.all_to_all(x, "expert", 0, 0)

    def whole_features(self, x: Array) -> Array:
        return jax.lax.all_gather(x, "tensor", axis=x.ndim - 1, tiled=True)

    def once(self, bias: Array) -> Array:
        """The bias on one of the devices that share a sum, and 0 on the others."""
        return jnp.where(jax.lax.axis_index("tensor") == 0, bias, jnp.zeros_like(bias))

    def sum(self, y: Array) -> Array:
        return jax.lax.psum(y, "tensor")


def all_experts(
    x: Float[Array, "n d"], experts: Experts, across: Across | None = None
) -> Float[Array, "e n d"]:
    """Every expert's output for every token."""
    num_experts = experts.down.w.shape[0]
    copies = jnp.broadcast_to(x[None], (num_experts, *x.shape))
    product = _cpu_batched if experts.cpu else _batched
    return experts(copies, product, lambda bias: bias[:, None], across)


def weighted_experts(
    x: Float[Array, "n d"],
    weights: Float32[Array, "n e"],
    experts: Experts,
    across: Across | None = None,
) -> Float[Array, "n d"]:
    """The weighted sum of every expert's output, in float32."""
    if across is not None:  # all tokens to all experts, and their sums back
        x = jax.lax.all_gather(x, "expert", tiled=True)
        weights = jax.lax.all_to_all(weights, "expert", 1, 0, tiled=True)
    out = all_experts(x, experts, across).astype(jnp.float32)
    y = jnp.einsum("end,ne->nd", out, weights)
    if across is not None:
        y = jax.lax.psum_scatter(y, "expert", tiled=True)
    return y.astype(x.dtype)


# ---------------------------------------------------------------------------- auxiliary losses


def balance_loss(
    load: Float32[Array, "e"], probabilities: Float32[Array, "e"]
) -> Float32[Array, ""]:
    """E sum_e f_e P_e (arXiv:2101.03961, equation 4): 1 where choices are spread evenly.

    `load` f sums to 1 for any number of choices a token; P is the mean router probability.
    """
    return load.shape[0] * jnp.sum(jax.lax.stop_gradient(load) * probabilities)


def router_z_loss(
    logits: Float32[Array, "b t e"], counted: Float32[Array, "b t"]
) -> Float32[Array, ""]:
    """Mean over tokens of logsumexp(logits)^2 (arXiv:2202.08906, equation 5)."""
    return mean_over(counted, jnp.square(jax.nn.logsumexp(logits, axis=-1)))


def mean_over(counted: Float32[Array, "b t"], x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The mean over tokens of weight `counted`; (B, T, ...) -> (...)."""
    total = jnp.maximum(jnp.sum(counted), 1.0)
    return jnp.einsum("bt,bt...->...", counted, x) / total


# ---------------------------------------------------------------------------- the layer


class Router(nnx.Module):
    """The parameters of a router, and its scores."""

    def __init__(
        self,
        key: Key[Array, ""],
        d_model: int,
        experts: int,
        spec: RouterSpec,
        init: WeightInit,
    ):
        self.spec = spec
        outputs = experts * spec.slots if spec.kind == "soft" else experts
        weight_key, noise_key = jax.random.split(key)
        biased = spec.kind in ("top_k", "noisy_top_k") and spec.bias
        noisy = spec.kind == "noisy_top_k"

        def weight(key):
            return parameter(key, (d_model, outputs), ("embed", None), init)

        def bias():
            return constant_parameter((outputs,), (None,), 0.0)

        self.w = weight(weight_key)
        self.b = bias() if biased else None
        self.noise_w = weight(noise_key) if noisy else None
        self.noise_b = bias() if noisy and biased else None
        balancing = spec.kind == "sigmoid_top_k"
        zeros = jnp.zeros((experts,), jnp.float32)
        self.balance = (
            nnx.Param(zeros, axes=("balance",), rate=spec.bias_rate) if balancing else None
        )

    def logits(
        self, x: Float[Array, "b t d"], key: Key[Array, ""] | None
    ) -> Float32[Array, "b t e"]:
        """Scores before any softmax. A key makes noise or jitter, where the router has them."""
        x = x.astype(jnp.float32)
        if self.spec.kind == "top_k" and self.spec.jitter and key is not None:
            low, high = 1.0 - self.spec.jitter, 1.0 + self.spec.jitter
            x = x * jax.random.uniform(key, x.shape, jnp.float32, low, high)
        logits = router_logits(x, self.w[...], None if self.b is None else self.b[...])
        if self.noise_w is not None and key is not None:
            bias = None if self.noise_b is None else self.noise_b[...]
            logits = noisy(logits, router_logits(x, self.noise_w[...], bias), key)
        return logits


class Moe(nnx.Module):
    """Tokens to their experts and back, (B, T, D) -> (B, T, D)."""

    def __init__(
        self,
        key: Key[Array, ""],
        d_model: int,
        spec: MoeSpec,
        *,
        init: WeightInit,
        residual_init: WeightInit,
        residual_scale: float,
        compute: ComputeSpec,
    ):
        self.spec, self.capacity = spec, spec.capacity
        self.cpu = use_cpu_kernels(compute)
        self.dispatch = compute.moe_dispatch
        router_key, experts_key, shared_key = jax.random.split(key, 3)
        how = {
            "init": init,
            "residual_init": residual_init,
            "residual_scale": residual_scale,
        }
        self.router = Router(router_key, d_model, spec.experts, spec.router, init)
        self.experts = Experts(experts_key, spec.experts, d_model, spec.expert, cpu=self.cpu, **how)
        shares = spec.shared is not None
        self.shared = (
            Mlp(shared_key, d_model, spec.shared, compute=compute, **how) if shares else None
        )

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        real: Bool[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b t d"], Routing]:
        """The output, and what the router did.

        `train` has capacity limits act, and, with a `key`, noise. Tokens that are not `real` are
        padding: they count in no mean.
        """
        if real is None:
            real = jnp.ones(x.shape[:2], bool)
        if self.spec.router.kind == "soft":
            y, routing = self._soft(x, real)
        else:
            y, routing = self._routed(x, real, key if train else None, train)
        return (y if self.shared is None else y + self.shared(x)), routing

    # ---- each token to some experts

    def _routed(self, x, real, key, train):
        spec, router = self.spec, self.spec.router
        t = x.shape[1]
        logits = self.router.logits(x, key)
        weights, probabilities, experts, kept, margin = self._choose(logits, real)
        places = t
        if router.kind == "expert_choice":
            places = places_per_row(router.load, 1, t, spec.experts)
        elif train:
            kept = real[..., None] & kept  # padding takes nobody's place
            if self.capacity is not None:
                places = places_per_row(self.capacity.load, router.k, t, spec.experts)
                kept = within_capacity(
                    experts,
                    weights,
                    kept,
                    num_experts=spec.experts,
                    capacity=places,
                    by_weight=self.capacity.priority == "weight",
                )
        y = self._through(x, experts, jnp.where(kept, weights, 0.0), kept, places)
        routing = self._record(logits, probabilities, experts, kept, margin, real)
        return y, routing

    def _choose(self, logits, real):
        """(weights, probabilities, experts, kept, margin) of every token."""
        router, e = self.spec.router, self.spec.experts
        if router.kind == "sigmoid_top_k":
            scores = jax.nn.sigmoid(logits)
            probabilities = normalised(scores)
            experts, margin = choose(
                scores + along_last(self.router.balance[...], scores), router.k
            )
            weights = jnp.take_along_axis(scores, experts, axis=-1)
            weights = router.scale * (normalised(weights) if router.renormalise else weights)
            return weights, probabilities, experts, jnp.ones(experts.shape, bool), margin
        probabilities = jax.nn.softmax(logits, axis=-1)
        if router.kind == "expert_choice":
            places = places_per_row(router.load, 1, logits.shape[1], e)
            kept = expert_choice(probabilities, places, real)
            experts = jnp.broadcast_to(jnp.arange(e, dtype=jnp.int32), logits.shape)
            return probabilities, probabilities, experts, kept, jnp.full(real.shape, jnp.inf)
        experts, margin = choose(logits, router.k)
        if router.kind == "noisy_top_k" or router.renormalise:
            # A softmax over the kept logits is their share of the whole softmax.
            weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
        else:
            weights = jnp.take_along_axis(probabilities, experts, axis=-1)
        return weights, probabilities, experts, jnp.ones(experts.shape, bool), margin

    def _through(self, x, experts, weights, kept, places) -> Float[Array, "b t d"]:
        """Tokens to the experts of their kept choices, and back, weighted.

        On a mesh each device sorts its own tokens, and they travel to their experts and back by
        an all-to-all each way (arXiv:2006.16668, section 3.2).
        """

        def part(x, own, across, experts, weights, kept):
            flat, weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1, weights.shape[-1])
            return self._part(flat, experts, weights, kept, places, own, across)

        return self._by_device(part, x, experts, weights, kept)

    def _by_device(self, part, x, *of_tokens) -> Float[Array, "b t d"]:
        """`part(x, experts, across, *of_tokens)` -> (N, D) of each device's rows and experts."""
        leaves, axes, rebuilt = self.experts.arrays()
        across = None if jax.sharding.get_abstract_mesh().empty else Across()
        rows = ("batch", None, None)

        def local(leaves, x, *of_tokens):
            y = part(x, rebuilt(leaves), across, *of_tokens)
            return (y if across is None else across.sum(y)).reshape(x.shape)

        local = on_each_device(local, axes, rows, *[rows for _ in of_tokens], out=rows)
        return local(leaves, x, *of_tokens)

    def _part(self, x, choices, weights, kept, places, experts, across) -> Float[Array, "n d"]:
        """`_through` of one device's tokens (N, D); `experts` are those that it keeps."""
        e = self.spec.experts
        if self.dispatch == "dense":
            onehot = jax.nn.one_hot(choices.reshape(x.shape[0], -1), e)
            by_expert = jnp.einsum("nk,nke->ne", weights, onehot)
            return weighted_experts(x, by_expert, experts, across)
        ways = 1 if across is None else across.experts
        most = min(choices.shape[-1], e // ways)  # of a token's choices, for one device
        fits = self.dispatch == "capacity" or self.spec.router.kind == "expert_choice"
        if fits or (ways > 1 and e * places < ways * choices.shape[1] * most):
            # An expert's choices fit a buffer exactly, or one that is smaller than any other.
            layout = capacity_layout(choices, kept, e, places, self.cpu)
            placed = dispatch(x, layout)
            if across is not None:
                placed = across.to_experts(placed)
            y = experts(placed, layout.product, layout.spread, across)
            return combine(y if across is None else across.from_experts(y), layout, weights)
        sort = self._sorted(x)
        if ways == 1:
            layout = sort(choices, kept, e)
            y = experts(dispatch(x, layout), layout.product, layout.spread, across)
            return combine(y, layout, weights)
        # No choice is dropped, so a device must be able to send all that it has to any other.
        device, expert = choices // (e // ways), choices % (e // ways)
        layout = device_layout(device, kept, ways, most)
        # Experts count from 1 here, so that 0 is an empty place.
        expert = dispatch_choices(expert.reshape(layout.slots.shape) + 1, layout)
        placed = across.to_experts(dispatch(x, layout))[0]
        expert = across.to_experts(expert)[0]
        inner = sort(expert[None, :, None] - 1, expert[None, :, None] > 0, e // ways)
        y = experts(dispatch(placed, inner), inner.product, inner.spread, across)
        y = combine(y, inner, jnp.ones(inner.slots.shape, jnp.float32))
        return combine(across.from_experts(y[None]), layout, weights)

    def _sorted(self, x: Float[Array, "n d"]) -> Callable[..., Layout]:
        """The layout of choices sorted by expert that is fastest where this is traced."""
        by_blas = self.cpu == "blas" and blas.multiplies(x.dtype) and blas.usable()
        by_blas = by_blas and x.shape[0] >= MANY_ROWS  # a few would not keep all threads busy
        ragged = by_blas or jax.default_backend() != "cpu"
        if self.dispatch == "ragged" or (self.dispatch == "auto" and ragged):
            return partial(ragged_layout, by_blas=by_blas)
        return blocks_layout

    def _record(self, logits, probabilities, experts, kept, margin, real) -> Routing:
        e, counted = self.spec.experts, real.astype(jnp.float32)
        made = kept if self.spec.router.kind == "expert_choice" else jnp.ones_like(kept)
        made = made * counted[..., None]
        flat = experts.reshape(1, -1)
        of = jnp.arange(e, dtype=jnp.int32)[:, None]
        load = jnp.sum((flat == of) * made.reshape(1, -1), axis=-1)
        choices = jnp.maximum(jnp.sum(made), 1.0)
        load = load / choices
        steer = jnp.float32(0)
        if self.router.balance is not None:
            bias = self.router.balance[...]
            steer = jnp.sum((load - 1.0 / e) * (bias - jax.lax.stop_gradient(bias)))
        entropies = -jnp.sum(probabilities * jnp.log(probabilities + 1e-20), axis=-1)
        return Routing(
            load=load,
            entropy=mean_over(counted, entropies),
            dropped=jnp.sum(made * ~kept) / choices,
            balance_loss=balance_loss(load, mean_over(counted, probabilities)),
            z_loss=router_z_loss(logits, counted),
            steer=steer,
            experts=experts,
            kept=kept,
            margin=margin,
        )

    # ---- each expert to mixtures of tokens

    def _soft(self, x, real):
        e, slots = self.spec.experts, self.spec.router.slots
        logits = self.router.logits(x, None)  # (B, T, E S)
        mixing = jax.nn.softmax(logits, axis=-1)
        by_expert = jnp.sum(mixing.reshape(*x.shape[:2], e, slots), axis=-1)
        if self.spec.router.over == "token":
            y = self._by_device(soft_over_token, x, by_expert)
        else:
            y = soft_over_sequence(x, logits, mixing, self.experts, real)
        b, t = real.shape
        counted, nothing = real.astype(jnp.float32), jnp.float32(0)
        entropies = -jnp.sum(by_expert * jnp.log(by_expert + 1e-20), axis=-1)
        return y, Routing(
            load=mean_over(counted, by_expert),
            entropy=mean_over(counted, entropies),
            dropped=nothing,
            balance_loss=nothing,
            z_loss=nothing,
            steer=nothing,
            experts=jnp.zeros((b, t, 0), jnp.int32),
            kept=jnp.zeros((b, t, 0), bool),
            margin=jnp.full((b, t), jnp.inf),
        )


def soft_over_sequence(
    x: Float[Array, "b t d"],
    logits: Float32[Array, "b t s"],
    mixing: Float32[Array, "b t s"],
    experts: Experts,
    real: Bool[Array, "b t"],
) -> Float[Array, "b t d"]:
    """arXiv:2308.00951, Algorithm 1: S = E x slots places, each a mixture of the row's tokens.

    Padding is in no mixture.
    """
    num_experts = experts.down.w.shape[0]
    b, _, d = x.shape
    into = jax.nn.softmax(jnp.where(real[..., None], logits, -1e30), axis=1).astype(x.dtype)
    placed = jnp.einsum("btd,bts->sbd", x, into).reshape(num_experts, -1, d)
    placed = constrain(placed, "expert", "rows", None)
    product = _cpu_batched if experts.cpu else _batched
    y = experts(placed, product, lambda bias: bias[:, None]).reshape(-1, b, d)
    return jnp.einsum("sbd,bts->btd", y, mixing.astype(x.dtype))


def soft_over_token(
    x: Float[Array, "b t d"],
    experts: Experts,
    across: Across | None,
    weights: Float32[Array, "b t e"],
) -> Float[Array, "n d"]:
    """The same of a group of one token: all slots of an expert read it, so one output serves."""
    n = x.shape[0] * x.shape[1]
    return weighted_experts(x.reshape(n, -1), weights.reshape(n, -1), experts, across)
