"""What a round's end and the next one's beginning do to the few numbers that say where each sequence stands."""

import torch

from .backends import uses_triton
from .validation import INT_DTYPES


def advance_torch(
    roots: torch.Tensor,
    root_positions: torch.Tensor,
    limits: torch.Tensor,
    lengths: torch.Tensor,
    window_lengths: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """The definition of `advance`."""
    last = counts.long().unsqueeze(1)
    roots.copy_(tokens.gather(1, last - 1))
    root_positions.add_(last)
    limits.sub_(last)
    lengths.add_(counts.int())
    window_lengths.add_(counts.int())


def advance(
    roots: torch.Tensor,
    root_positions: torch.Tensor,
    limits: torch.Tensor,
    lengths: torch.Tensor,
    window_lengths: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Move sequences on by the first `counts` of their newly drawn tokens, in place.

    Args:
        roots: int64 `[B, 1]`, becomes the last of those tokens.
        root_positions: int64 `[B, 1]`, grows by `counts`.
        limits: int64 `[B, 1]`, shrinks by `counts`.
        lengths, window_lengths: int32 `[B]`, grow by `counts`.
        counts: int32 or int64 `[B]`, from 1 to P.
        tokens: int64 `[B, P]`.

    Raises:
        ValueError: a shape or dtype does not fit, or what is written to is not contiguous.
    """
    batch = roots.shape[0]
    for name, tensor, shape, dtype in (
        ("roots", roots, (batch, 1), torch.int64),
        ("root_positions", root_positions, (batch, 1), torch.int64),
        ("limits", limits, (batch, 1), torch.int64),
        ("lengths", lengths, (batch,), torch.int32),
        ("window_lengths", window_lengths, (batch,), torch.int32),
    ):
        if not (tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()):
            raise ValueError(
                f"`{name}` must be {dtype} of shape {list(shape)} and contiguous, for it is written in place, got "
                f"{tensor.dtype} of shape {list(tensor.shape)} and strides {list(tensor.stride())}."
            )
    if not (counts.shape == (batch,) and counts.dtype in INT_DTYPES):
        raise ValueError(
            f"`counts` must be int32 or int64 of shape [{batch}], got {counts.dtype} of shape {list(counts.shape)}."
        )
    if not (tokens.dim() == 2 and tokens.shape[0] == batch and tokens.dtype == torch.int64):
        raise ValueError(
            f"`tokens` must be torch.int64 of shape [{batch}, P], got {tokens.dtype} of shape {list(tokens.shape)}."
        )
    given = (roots, root_positions, limits, lengths, window_lengths, counts, tokens)
    if uses_triton(roots):
        from .fused_state_kernel import advance_triton

        return advance_triton(*given)
    return advance_torch(*given)


def rotary_rows_torch(
    cos_table: torch.Tensor,
    sin_table: torch.Tensor,
    first: int,
    root_positions: torch.Tensor,
    limits: torch.Tensor,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition of `rotary_rows`."""
    positions = root_positions + torch.arange(steps, device=root_positions.device)
    at = torch.minimum(positions, root_positions + limits.clamp(min=0)) - first
    return cos_table[at], sin_table[at], positions


def rotary_rows(
    cos_table: torch.Tensor,
    sin_table: torch.Tensor,
    first: int,
    root_positions: torch.Tensor,
    limits: torch.Tensor,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of rotary tables for the positions from each root on, the last allowed one instead of those behind it.

    Args:
        cos_table, sin_table: `[N, R]` of positions `first` to `first + N - 1`; the roots' positions and those of their
            limits must be among them. Nobody checks that: they are on the device.
        first: position of the tables' first row.
        root_positions: int64 `[B, 1]`.
        limits: int64 `[B, 1]`, how far behind the root a position may lie; below 0 counts as 0.
        steps: P.

    Returns:
        cos and sin `[B, P, R]`, and int64 `[B, P]` the positions, those behind the limit too.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if not (cos_table.dim() == 2 and cos_table.is_contiguous()):
        raise ValueError(
            f"`cos_table` must be [N, R] and contiguous, got shape {list(cos_table.shape)} and strides "
            f"{list(cos_table.stride())}."
        )
    alike = sin_table.shape == cos_table.shape and sin_table.dtype == cos_table.dtype and sin_table.is_contiguous()
    if not alike:
        raise ValueError(
            f"`sin_table` must be {cos_table.dtype} of shape {list(cos_table.shape)} and contiguous like "
            f"`cos_table`, got {sin_table.dtype} of shape {list(sin_table.shape)} and strides "
            f"{list(sin_table.stride())}."
        )
    for name, tensor in (("root_positions", root_positions), ("limits", limits)):
        if not (tensor.dim() == 2 and tensor.shape == (root_positions.shape[0], 1) and tensor.dtype == torch.int64):
            raise ValueError(
                f"`{name}` must be torch.int64 of shape [B, 1], the same for both, got {tensor.dtype} of shape "
                f"{list(tensor.shape)}."
            )
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")
    given = (cos_table, sin_table, first, root_positions, limits, steps)
    if uses_triton(cos_table):
        from .fused_state_kernel import rotary_rows_triton

        return rotary_rows_triton(*given)
    return rotary_rows_torch(*given)
