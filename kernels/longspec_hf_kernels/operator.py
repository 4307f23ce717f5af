"""`torch.ops.longspec_hf.hybrid_tree_attention`: the operator torch.compile and torch.export see."""

import torch

from .backends import load_backend, select_backend

_library = torch.library.Library("longspec_hf", "FRAGMENT")
_library.define(
    "hybrid_tree_attention(Tensor query, Tensor key, Tensor value, Tensor prefix_lens, Tensor? ancestor_bits, "
    "Tensor? starts, Tensor? depths, Tensor? key_depths, Tensor? sinks, float scale, int? window, float? softcap) "
    "-> Tensor",
    # Every backend reads any strides: a compiler need not copy the K/V buffers to a layout of its own.
    tags=(torch.Tag.flexible_layout,),
)


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lens: torch.Tensor,
    ancestor_bits: torch.Tensor | None,
    starts: torch.Tensor | None,
    depths: torch.Tensor | None,
    key_depths: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    name = select_backend(query, window, softcap)
    options = {"starts": starts, "scale": scale, "softcap": softcap, "sinks": sinks}
    if name != "flash":
        options |= {"depths": depths, "key_depths": key_depths, "window": window}
    with torch.cuda.device_of(query):  # kernels are launched on the current device
        return load_backend(name)(query, key, value, prefix_lens, ancestor_bits, **options)


def _fake(query: torch.Tensor, *_arguments: object) -> torch.Tensor:
    """Shape, dtype and strides of the result: `[B, Hq, T, D]` seen through `[B, T, Hq, D]`."""
    batch, heads, nodes, size = query.shape
    return query.new_empty(batch, nodes, heads, size).transpose(1, 2)


_library.impl("hybrid_tree_attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("longspec_hf::hybrid_tree_attention", _fake, lib=_library)
