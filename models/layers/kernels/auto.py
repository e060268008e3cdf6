"""The kernel that attention uses unless told otherwise: whichever is best for the platform and what is asked for."""

import dataclasses
import functools
import logging
from typing import Unpack

import jax

from meshway.models.layers.kernels.attention_shards import Cut, cut_of
from meshway.models.layers.kernels.choice import Call, Choice, choose, describe
from meshway.models.layers.kernels.chunked import ChunkedAttention
from meshway.models.layers.kernels.fused import CudnnAttention, SplashAttention
from meshway.models.layers.kernels.reference import Kernel, Options, dot_product_attention

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AutoAttention:
    """A `Kernel` that hands each call to another one, by `choice.choose`, and logs which and why, once for each kind of
    call: splash on TPUs and cuDNN on CUDA where these can do what is asked, else the reference for few scores and
    chunked attention for many. Shapes and options decide, never values, so a compiled step always uses the same ones.

    Attributes:
      chunked, splash, cudnn: the kernels to choose from, with their block sizes.
    """

    chunked: Kernel = ChunkedAttention()
    splash: Kernel = SplashAttention()
    cudnn: Kernel = CudnnAttention()

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Unpack[Options]) -> jax.Array:
        """See `dot_product_attention`."""
        cut = cut_of(query, key)
        choice = _chosen(_platform(cut), describe(query, key, **options, cut=cut))
        kernels: dict[str, Kernel] = {
            "reference": dot_product_attention,
            "chunked": self.chunked,
            "splash": self.splash,
            "cudnn": self.cudnn,
        }
        return kernels[choice.name](query, key, value, **options)


@functools.cache
def _chosen(platform: str, call: Call) -> Choice:
    """Chooses, and logs it: once, since what was chosen is kept."""
    choice = choose(platform, call)
    shape = f"{call.length} x {call.kv_length}, head_dim {call.head_dim}, {call.dtype}"
    logger.info("attention on %s (%s): %s, since %s", platform, shape, choice.name, choice.reason)
    return choice


def _platform(cut: Cut | None) -> str:
    """Returns where a call will run: on the mesh's devices, which may be described only, else on jax's first."""
    device = jax.devices()[0] if cut is None else cut.mesh.devices.flat[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
