"""Random problems for the fused steps, with NaN in every buffer row that nobody wrote."""

from typing import Any

import torch

# A sum or an exponential in another order may round to the next number, twice in a row of roundings; in fp32 sums
# over thousands of terms and approximate exponentials show.
RELATIVE = {torch.float32: 1e-5, torch.float16: 2 * 2.0**-10, torch.bfloat16: 2 * 2.0**-7}
# fp16 and bf16 numbers that may differ at all: where fp32 values that differ by 1e-6 lie next to the middle between
# two. A rounding left out or in another place changes every third.
CHANGED = 0.02
# fp32 sums of exponentials over a vocabulary, and the logarithm.
SCORE_ERROR = 1e-4
# Where the tests' K/V rows begin.
FIRST_ROWS = [7, 0, 11]
CAPACITY = 40


def assert_near(got: torch.Tensor, expected: torch.Tensor, steps: int = 1, changed_share: float = CHANGED) -> None:
    """Equal but for the rounding of `steps` calls, relative to each number and to a small part of the largest.

    Of half-precision numbers `steps * changed_share` may differ at all.
    """
    tolerance = steps * RELATIVE[expected.dtype]
    largest = float(expected.nan_to_num(0).abs().max())
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * largest / 4, equal_nan=True)
    if expected.dtype != torch.float32:
        changed = int((got.nan_to_num(99) != expected.nan_to_num(99)).sum())
        assert changed <= 1 + steps * changed_share * expected.numel(), changed / expected.numel()


def randoms(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def children_case(
    *, batch: int = 2, nodes: int = 5, width: int = 4, words: int = 2, names: bool = True, last: bool = False,
    device: str = "cpu", seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `append_children`: a level of `nodes` behind three others, in a beam of eight more columns."""
    generator = torch.Generator().manual_seed(seed)

    def integers(most: int, *shape: int) -> torch.Tensor:
        return torch.randint(most, shape, generator=generator).to(device)

    beam = torch.full((2, batch, width + 8), -7, device=device)
    scores = torch.full((batch, width + 8), -7.0, device=device)
    found = torch.randn(batch, width, generator=generator).to(device)
    found[:1, -1] = -float("inf")
    return {
        "beam": (beam[0], beam[1], scores),
        "children": (found, integers(nodes, batch, width), integers(50, batch, width)),
        "place": 3,
        "first_node": -1 if nodes == 1 else 2,
        "token_ids": torch.randperm(100, generator=generator)[:50].to(device) if names else None,
        "bits": integers(2**62, batch, nodes, words),
        "own_bits": None if last else integers(2**62, batch, width, words),
    }


def appended_by_hand(case: dict[str, Any]) -> tuple[list[Any], list[Any] | None]:
    """The beam's tokens, parents and scores as lists, and the children's bits."""
    scores, parents, tokens = (part.tolist() for part in case["children"])
    names = list(range(50)) if case["token_ids"] is None else case["token_ids"].tolist()
    beam = [part.tolist() for part in case["beam"]]
    seen: list[Any] = []
    for row, found in enumerate(tokens):
        seen.append([])
        for child, token in enumerate(found):
            parent, column = parents[row][child], case["place"] + child
            beam[0][row][column] = names[token]
            beam[1][row][column] = parent + case["first_node"]
            beam[2][row][column] = scores[row][child]
            if case["own_bits"] is not None:
                pairs = zip(case["bits"][row, parent].tolist(), case["own_bits"][row, child].tolist(), strict=True)
                seen[-1].append([inherited | own for inherited, own in pairs])
    return beam, None if case["own_bits"] is None else seen


def rotary_case(
    *,
    batch: int = 3,
    nodes: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    rotary: int | None = None,
    norms: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `rotate_and_store`: slices of one projection, buffers with a sequence to spare, heads inside."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    width = (heads + 2 * kv_heads) * head_dim
    projected = randoms(batch, nodes, width, seed=seed, **options)
    query, key, value = projected.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    shape = (batch + 1, CAPACITY, kv_heads, head_dim)
    case = {
        "query": query,
        "key": key,
        "value": value,
        "cos": randoms(batch, nodes, rotary or head_dim, seed=seed + 1, **options),
        "sin": randoms(batch, nodes, rotary or head_dim, seed=seed + 2, **options),
        "key_buffer": torch.full(shape, float("nan"), **options).transpose(1, 2),
        "value_buffer": torch.full(shape, float("nan"), **options).transpose(1, 2),
        "first_rows": torch.tensor(FIRST_ROWS[:batch], dtype=torch.int32, device=device),
        "head_dim": head_dim,
        "offset": 3,
    }
    if norms:
        case["query_norm"] = randoms(head_dim, seed=seed + 3, **options)
        case["key_norm"] = randoms(head_dim, seed=seed + 4, **options)
        case["eps"] = 1e-6
    return case


def fresh_buffers(case: dict[str, Any]) -> dict[str, Any]:
    """The case with unwritten buffers of the same strides."""
    names = ("key_buffer", "value_buffer")
    return case | {name: torch.full_like(case[name], float("nan")) for name in names}


def child_scores(scores: torch.Tensor, logits: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    """fp64 `[B, k, V]` scores of all children, by PyTorch's log-softmax."""
    wide = logits.double()
    wide = wide if softcap is None else softcap * (wide / softcap).tanh()
    return scores.double().unsqueeze(-1) + wide.log_softmax(-1)


def assert_best(children: tuple[torch.Tensor, ...], every: torch.Tensor, width: int) -> None:
    """The children are different ones, carry their own scores, and no better ones are left out."""
    got, parent, token = children
    vocabulary = every.shape[-1]
    flat = every.flatten(1)
    best = flat.topk(min(width, flat.shape[1]), dim=1).values
    index = parent * vocabulary + token
    assert got.shape == parent.shape == token.shape == best.shape
    assert bool((token < vocabulary).all()) and all(len(set(row)) == len(row) for row in index.tolist())
    torch.testing.assert_close(got.double(), best, rtol=0, atol=SCORE_ERROR)
    torch.testing.assert_close(got.double(), flat.gather(1, index), rtol=0, atol=SCORE_ERROR)
    assert bool((got.diff(dim=1) <= 0).all())


def moved_by_hand(
    buffer: torch.Tensor, lengths: torch.Tensor, visited: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """What `RowMover.move` makes of a buffer, row by row."""
    result = buffer.clone()
    for b in range(visited.shape[0]):
        for i in range(1, int(counts[b])):
            result[b, :, int(lengths[b]) + i] = buffer[b, :, int(lengths[b] + visited[b, i])]
    return result
