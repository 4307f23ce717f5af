"""The definition of hybrid tree attention: explicit masks, one explicit softmax, any device."""

import torch

from .masks import tree_visibility


def hybrid_tree_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_lens: torch.Tensor,
    ancestor_bits: torch.Tensor | None,
    *,
    starts: torch.Tensor | None = None,
    depths: torch.Tensor | None = None,
    key_depths: torch.Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of tree nodes over a prefix (unmasked) and over tree rows (by ancestor bits).

    The maths, for sequence `b`, query head `h`, its K/V head `g = h // (Hq / Hkv)` and node `i`:

        rows(i) = {r : start_b <= r < prefix_b}  union  {prefix_b + j : bit j of node i is set}
        s_ir    = scale * <q_i, k_r>                     then  softcap * tanh(s_ir / softcap)
        out_i   = sum_r exp(s_ir) v_r / (sum_r exp(s_ir) + exp(sink_h))

    over `r` in `rows(i)`; the sink term only with `sinks`. With `window = W`, a row is dropped from
    `rows(i)` when `position(i) - position(r) >= W`, where a node stands at `prefix_b + depth`, a
    prefix row `r` at `r` and tree row `j` at `prefix_b + key_depth_j`: the key at distance `W - 1`
    is seen, the one at `W` is not. A node that sees nothing gives zeros.

    Query rows and tree rows are independent: a draft step evaluates only the newest level's `T`
    nodes while the `C >= T` tree rows hold all levels.

    Args:
        query: `[B, Hq, T, D]`, fp16, bf16, fp32 or fp64.
        key, value: `[B, Hkv, capacity, D]`, any strides, `Hq % Hkv == 0`. Rows that no node sees
            are never used, whatever they hold (NaN included).
        prefix_lens: int32 or int64 `[B]`, committed rows of each sequence.
        ancestor_bits: int64 `[B, T, ceil(C / 64)]`, or None when there are no tree rows.
        starts: int `[B]`, first visible row (left padding), default 0.
        depths: int `[B, T]`, depth of each query node (root = 0); needed with `window`.
        key_depths: int `[B, C]`, depth of each tree row; needed with `window` and `ancestor_bits`.
        scale: multiplies the scores.
        window, softcap: see above.
        sinks: `[Hq]` logits that join the softmax denominator only.

    Returns:
        `[B, Hq, T, D]` in the query's dtype. Scores and statistics are fp32 (fp64 for fp64 inputs).

    Source: LongSpec (arXiv 2502.17421), section on hybrid tree attention; one softmax here where the
    paper merges two partial ones by their log-sum-exp.
    """
    batch, heads, nodes, _ = query.shape
    group = heads // key.shape[1]
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for b in range(batch):
        prefix = int(prefix_lens[b])
        row = torch.arange(key.shape[2], device=query.device)
        visible = (row < prefix) & (row >= (0 if starts is None else starts[b]))
        visible = visible.expand(nodes, -1)
        if window is not None and depths is not None:
            visible = visible & (prefix + depths[b].unsqueeze(-1) - row < window)
        if ancestor_bits is not None:
            tree = tree_visibility(
                ancestor_bits[b],
                None if depths is None else depths[b],
                None if key_depths is None else key_depths[b],
                window,
            )[:, : key.shape[2] - prefix]
            visible = visible.clone()
            visible[:, prefix : prefix + tree.shape[1]] = tree
        used = visible.any(0).unsqueeze(-1)
        # Rows nobody sees may hold NaN, which 0 * NaN would let through.
        keys = torch.where(used, key[b], 0).to(accumulate).repeat_interleave(group, dim=0)
        values = torch.where(used, value[b], 0).to(accumulate).repeat_interleave(group, dim=0)
        scores = query[b].to(accumulate) @ keys.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.to(accumulate).view(heads, 1, 1).expand(heads, nodes, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # an all-hidden row is 0/0
        out[b] = (weights[..., : keys.shape[1]] @ values).to(query.dtype)
    return out
