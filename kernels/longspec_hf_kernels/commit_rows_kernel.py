"""`RowMover.move` in Triton: one launch for all buffers of a layout."""

import torch
import triton
import triton.language as tl

WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit(do_not_specialize=["most", "capacity", "heads"])
def move_rows_kernel(
    addresses, lengths, visited, counts,
    stride_b, stride_h, stride_n, stride_length, stride_visited_b, stride_visited_p, stride_count,
    most, capacity, heads,
    WORD: tl.constexpr, ROW_WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (buffers, sequences * heads). Strides of the buffers and `ROW_WORDS` count words of the type `WORD`.

    A thread copies the same words of every row, in order, and no step reads a row that an earlier one wrote
    (`visited[j] >= j > i` for steps i < j): a copy in place is safe without a barrier.
    """
    buffer = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(WORD))
    sequence = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    first = tl.load(lengths + sequence * stride_length).to(tl.int64)
    count = tl.minimum(tl.load(counts + sequence * stride_count).to(tl.int32), most)
    word = tl.arange(0, BLOCK)
    mask = word < ROW_WORDS
    base = buffer + sequence * stride_b + head * stride_h
    for step in range(1, count):
        node = tl.load(visited + sequence * stride_visited_b + step * stride_visited_p)
        node = tl.where(first + node < capacity, node, 0)
        if node > step:
            row = tl.load(base + (first + node) * stride_n + word, mask=mask)
            tl.store(base + (first + step) * stride_n + word, row, mask=mask)


def word_bytes(*bytes_apart: int) -> int:
    """The largest word, up to 8 bytes, that all these distances are multiples of."""
    return next(size for size in WORDS if all(distance % size == 0 for distance in bytes_apart))


def move_rows_triton(
    buffer: torch.Tensor,
    addresses: torch.Tensor,
    alignment: int,
    lengths: torch.Tensor,
    visited: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """`move_rows_torch` for all buffers of one layout, in place.

    Args:
        buffer: one of them.
        addresses: int64 `[buffers]` on their device.
        alignment: bytes that every address is a multiple of, or more than a word.

    Others as in `RowMover.move`.
    """
    _, heads, capacity, size = buffer.shape
    row_bytes = size * buffer.element_size()
    strides = [stride * buffer.element_size() for stride in buffer.stride()[:3]]
    word = word_bytes(alignment, row_bytes, *strides)
    move_rows_kernel[(len(addresses), visited.shape[0] * heads)](
        addresses,
        lengths,
        visited,
        counts,
        *(stride // word for stride in strides),
        lengths.stride(0),
        *visited.stride(),
        counts.stride(0),
        visited.shape[1],
        capacity,
        heads,
        WORD=WORDS[word],
        ROW_WORDS=row_bytes // word,
        BLOCK=triton.next_power_of_2(row_bytes // word),
        num_warps=1,
        num_stages=1,
    )
