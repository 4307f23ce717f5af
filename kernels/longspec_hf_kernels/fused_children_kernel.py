"""`append_children` in Triton: a program per sequence."""

import torch
import triton
import triton.language as tl

from .early_launch import overlapped, release_successor, wait_for_predecessor
from .triton_configs import device_limits


@triton.jit(do_not_specialize=["width", "nodes", "most", "place", "first_node", "words"])
def append_children_kernel(
    scores, parents, tokens, token_ids, bits, own_bits, beam_tokens, beam_parents, beam_scores, child_bits,
    width, nodes, most, place, first_node, words,
    BLOCK: tl.constexpr, HAS_NAMES: tl.constexpr, HAS_BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences,)."""
    if EARLY:
        wait_for_predecessor()
        release_successor()
    sequence = tl.program_id(0).to(tl.int64)
    child = tl.arange(0, BLOCK)
    mask = child < width
    at = sequence * width + child
    parent = tl.load(parents + at, mask=mask, other=0)
    token = tl.load(tokens + at, mask=mask, other=0)
    if HAS_NAMES:
        token = tl.load(token_ids + token, mask=mask, other=0)
    into = sequence * most + place + child
    tl.store(beam_tokens + into, token, mask=mask)
    tl.store(beam_parents + into, parent + first_node, mask=mask)
    tl.store(beam_scores + into, tl.load(scores + at, mask=mask, other=0.0), mask=mask)
    if HAS_BITS:
        for word in range(words):
            seen = tl.load(bits + (sequence * nodes + parent) * words + word, mask=mask, other=0)
            own = tl.load(own_bits + at * words + word, mask=mask, other=0)
            tl.store(child_bits + at * words + word, seen | own, mask=mask)


def append_children_triton(
    beam: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    children: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    place: int,
    first_node: int,
    token_ids: torch.Tensor | None,
    bits: torch.Tensor,
    own_bits: torch.Tensor | None,
) -> torch.Tensor | None:
    """`append_children_torch` in one launch."""
    batch, width = children[2].shape
    own = None if own_bits is None else own_bits.contiguous()
    child_bits = None if own is None else torch.empty_like(own)
    early = device_limits(beam[2].device).dependent_launch
    if batch and width:
        append_children_kernel[(batch,)](
            *(part.contiguous() for part in children),
            None if token_ids is None else token_ids.contiguous(),
            bits.contiguous(),
            own,
            *beam,
            child_bits,
            width,
            bits.shape[1],
            beam[0].shape[1],
            place,
            first_node,
            bits.shape[-1],
            BLOCK=triton.next_power_of_2(width),
            HAS_NAMES=token_ids is not None,
            HAS_BITS=own is not None,
            EARLY=early,
            num_warps=1,
            **overlapped(early),
        )
    return child_bits
