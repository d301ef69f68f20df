"""Attention whose scores never lie in memory (arXiv:2205.14135), by kernels of others.

- splash: JAX's Pallas kernel for TPU, `jax.experimental.pallas.ops.tpu.splash_attention`. It makes
  causal masks, windows, segments and caps itself and skips blocks that are hidden whole. Lowered
  for another platform it is interpreted, which is for tests: it is slow.
- cudnn: cuDNN's on NVIDIA, through `jax.nn.dot_product_attention`, in bfloat16. No GPU has run it
  here: the arguments are held to the plain path through XLA's implementation of the same function.

What neither does goes the plain way (`attention.attend`): a cache, dropout on the weights, biases
by head, masks of padding, positions that are not those of the row, cross-attention, and lengths
that do not fill the kernel's blocks.

Axes: B batch, T tokens, H heads, K kv heads, C head width.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from assay.model.sharding import partition
from assay.spec.run import ComputeSpec

Kernel = Literal["splash", "cudnn"]

LANES = 128
"""A TPU's tile: the kernel's blocks are so many queries and keys, or a multiple."""

CUDNN_WIDTH = 128
"""The widest head that cuDNN's kernel takes on every generation since Ampere."""


def flash_kernel(compute: ComputeSpec) -> Kernel | None:
    """The kernel of the device that JAX runs on; `kernels="flash"` off a GPU is the TPU's."""
    backend = jax.default_backend()
    if compute.kernels == "flash":
        return "cudnn" if backend == "gpu" else "splash"
    if compute.kernels == "auto":
        return {"tpu": "splash", "gpu": "cudnn"}.get(backend)
    return None


def fits(
    kernel: Kernel,
    dtype: str,
    t: int,
    width: int,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> bool:
    """Whether a kernel does attention of T queries to as many keys, of heads of C."""
    if kernel == "splash":
        return t % LANES == 0
    return (
        dtype == "bfloat16"
        and width % 8 == 0
        and width <= CUDNN_WIDTH
        and t % 2 == 0
        and softcap is None
        and (window is None or causal)
    )


def flash_attend(
    q: Float[Array, "b t h c"],
    k: Float[Array, "b t k c"],
    v: Float[Array, "b t k c"],
    segment_ids: Int32[Array, "b t"] | None = None,
    *,
    kernel: Kernel,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "b t h c"]:
    """As `attention.attend` with the masks that these arguments describe.

    On a mesh each device has its rows and its heads; where kv heads do not divide, every device
    along `tensor` computes all of them.
    """
    settings = {"causal": causal, "window": window, "scale": scale}
    if kernel == "splash":
        local = partial(_splash_attend, softcap=softcap, **settings)
    else:
        local = partial(cudnn_attend, **settings)
    segments = () if segment_ids is None else (segment_ids,)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        heads = None if k.shape[2] % mesh.shape["tensor"] else "heads"
        by_head, by_row = partition(("batch", None, heads, None)), partition(("batch", None))
        local = jax.shard_map(
            local,
            in_specs=(by_head, by_head, by_head, *[by_row for _ in segments]),
            out_specs=by_head,
            check_vma=False,
        )
    return local(q, k, v, *segments)


def _splash_attend(q, k, v, segment_ids=None, *, causal, window, scale, softcap):
    # Imported here, since only a TPU (and a test) pays for it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, heads = q.shape[1:3]
    if window is not None:
        mask = masks.LocalMask((t, t), (window - 1, 0 if causal else window - 1), offset=0)
    else:
        mask = (masks.CausalMask if causal else masks.FullMask)((t, t))
    # The largest blocks, up to 512, that divide T: fewer and fuller steps of the kernel.
    size = next(size for size in (512, 256, LANES) if t % size == 0)
    passes = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    blocks = splash.BlockSizes(**{f"block_{name}": size for name in passes})

    def run(q, k, v, *segments, interpret):
        attend = splash.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        if not segments:
            return jax.vmap(attend)(q, k, v)
        return jax.vmap(attend)(q, k, v, splash.SegmentIds(*2 * segments))

    # The kernel has no scale; its layout is (B, H, T, C).
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    y = jax.lax.platform_dependent(
        *(q, k, v, *(() if segment_ids is None else (segment_ids,))),
        tpu=partial(run, interpret=False),
        default=partial(run, interpret=True),
    )
    return y.swapaxes(1, 2)


def cudnn_attend(
    q, k, v, segment_ids=None, *, causal, window, scale, implementation="cudnn"
) -> Float[Array, "b t h c"]:
    """`jax.nn.dot_product_attention`, by cuDNN or (`implementation="xla"`) as XLA would."""
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    reach = None if window is None else (window - 1, 0 if causal else window - 1)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=causal,
        local_window_size=reach,
        implementation=implementation,
    )
