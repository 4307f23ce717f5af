"""The children of a level take their places in a beam."""

import torch

from .backends import uses_triton


def append_children_torch(
    beam: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    children: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    place: int,
    first_node: int,
    token_ids: torch.Tensor | None,
    bits: torch.Tensor,
    own_bits: torch.Tensor | None,
) -> torch.Tensor | None:
    """The definition of `append_children`."""
    scores, parents, tokens = children
    into = slice(place, place + tokens.shape[1])
    beam[0][:, into] = tokens if token_ids is None else token_ids[tokens]
    beam[1][:, into] = parents + first_node
    beam[2][:, into] = scores
    if own_bits is None:
        return None
    return bits.gather(1, parents.unsqueeze(-1).expand(-1, -1, bits.shape[-1])) | own_bits


def append_children(
    beam: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    children: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    place: int,
    first_node: int,
    token_ids: torch.Tensor | None,
    bits: torch.Tensor,
    own_bits: torch.Tensor | None,
) -> torch.Tensor | None:
    """Write a level's children into a beam, in place, and say what they see of the tree's rows.

    Args:
        beam: tokens (int64), parents (int64) and scores (fp32) `[B, N]`, contiguous.
        children: scores, parents (within the level) and tokens `[B, m]`, as `best_children_fused` gives them.
        place: column of the beam where the children go.
        first_node: what is added to their parents.
        token_ids: int64 `[V]`, names of the tokens; None if they are their own.
        bits: int64 `[B, k, words]`, rows that each node of the level sees.
        own_bits: int64 `[B, m, words]`, the children's own rows; None if nobody needs to know what they see.

    Returns:
        int64 `[B, m, words]`: what each child's parent sees, and its own row. None without `own_bits`.

    Raises:
        ValueError: a shape or dtype does not fit, or the children do not fit into the beam.
    """
    batch, most = beam[0].shape
    width = children[2].shape[-1]
    for name, tensors, columns, dtypes in (
        ("beam", beam, most, (torch.int64, torch.int64, torch.float32)),
        ("children", children, width, (torch.float32, torch.int64, torch.int64)),
    ):
        if not all(t.shape == (batch, columns) and t.dtype == d for t, d in zip(tensors, dtypes, strict=True)):
            raise ValueError(
                f"`{name}` must be {', '.join(map(str, dtypes))} of shape {[batch, columns]} each, got "
                f"{', '.join(f'{t.dtype} of shape {list(t.shape)}' for t in tensors)}."
            )
    if not all(t.is_contiguous() for t in beam):
        raise ValueError("`beam` must be contiguous tensors: it is written in place.")
    if not (bits.dim() == 3 and bits.shape[0] == batch and bits.dtype == torch.int64):
        raise ValueError(
            f"`bits` must be torch.int64 of shape [{batch}, nodes, words], got {bits.dtype} of shape "
            f"{list(bits.shape)}."
        )
    seen = (batch, width, bits.shape[-1])
    if not (own_bits is None or (own_bits.shape == seen and own_bits.dtype == torch.int64)):
        raise ValueError(
            f"`own_bits` must be None or torch.int64 of shape {list(seen)}, got "
            f"{None if own_bits is None else f'{own_bits.dtype} of shape {list(own_bits.shape)}'}."
        )
    if not (place >= 0 and place + width <= most):
        raise ValueError(
            f"`place` must be from 0 to {most - width} for {width} children in a beam of {most}, got {place}."
        )
    if uses_triton(beam[2]):
        from .fused_children_kernel import append_children_triton

        return append_children_triton(beam, children, place, first_node, token_ids, bits, own_bits)
    return append_children_torch(beam, children, place, first_node, token_ids, bits, own_bits)
