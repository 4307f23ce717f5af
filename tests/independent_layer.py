"""The published LongSpec layer written a second time, from its maths, in plain PyTorch, without the package.

One text, no batch axis. Every quantity says which rows its queries see, as a boolean matrix; nothing is cached,
blocked or fused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WINDOW = 512  # a query at p sees the keys p - 512 .. p
STEPS = 3


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer and what its maths needs to know of the target."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float


def random_checkpoint(sizes: Sizes, seed: int = 0, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """A random draft in the published layout: 20 tensors, unused ones and biases of both attentions included."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    tensors = {}
    for attention in ("self_attn", "cross_attn"):
        for name, heads in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads)):
            tensors[f"{attention}.{name}_proj.weight"] = random(heads * sizes.head_dim, sizes.hidden)
            tensors[f"{attention}.{name}_proj.bias"] = random(heads * sizes.head_dim)
        tensors[f"{attention}.o_proj.weight"] = random(sizes.hidden, sizes.heads * sizes.head_dim)
    tensors["mlp.gate_proj.weight"] = random(sizes.intermediate, sizes.hidden)
    tensors["mlp.up_proj.weight"] = random(sizes.intermediate, sizes.hidden)
    tensors["mlp.down_proj.weight"] = random(sizes.hidden, sizes.intermediate)
    for norm in ("input_layernorm", "post_self_attention_layernorm", "post_cross_attention_layernorm"):
        tensors[f"{norm}.weight"] = 1 + random(sizes.hidden)
    return tensors


class IndependentLayer:
    """The layer's maths on tensors in the published layout."""

    def __init__(self, tensors: dict[str, torch.Tensor], sizes: Sizes) -> None:
        self.tensors = tensors
        self.sizes = sizes

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        bias = self.tensors.get(f"{name}.bias")
        y = x @ self.tensors[f"{name}.weight"].T
        return y if bias is None else y + bias

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x / (mean_square + self.sizes.norm_eps).sqrt() * self.tensors[f"{name}.weight"]

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Channel i of the first half turns with channel i of the second, by position / theta^(2i/D)."""
        half = self.sizes.head_dim // 2
        # In fp32 and as a quotient, as targets do it: at position 30 000 another rounding shows in the third decimal.
        frequency = 1.0 / self.sizes.rope_theta ** (torch.arange(half, dtype=torch.float32) / half)
        angle = (positions[:, None].float() * frequency)[:, None]
        first, second = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _heads(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._linear(name, x).reshape(len(x), -1, self.sizes.head_dim)

    def keys_values(self, embeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Self-attention keys (rotated) and values `[T, Hkv, D]` of embeddings `[T, hidden]`."""
        h = self._norm("input_layernorm", embeds)
        return self._rotate(self._heads("self_attn.k_proj", h), positions), self._heads("self_attn.v_proj", h)

    def _attend(self, name, x, positions, keys, values, sees):
        """Attention of `[T, hidden]` to rows `[N, Hkv, D]` by `sees` `[T, N]`; no row seen gives zero."""
        q = self._rotate(self._heads(f"{name}.q_proj", x), positions)
        shared = self.sizes.heads // self.sizes.kv_heads
        out = torch.zeros_like(q)
        for head in range(self.sizes.heads):
            scores = q[:, head] @ keys[:, head // shared].T / self.sizes.head_dim**0.5
            weights = scores.masked_fill(~sees, float("-inf")).softmax(-1).nan_to_num(0.0)
            out[:, head] = weights @ values[:, head // shared]
        return self._linear(f"{name}.o_proj", out.flatten(1))

    def run(self, embeds, positions, window_rows, sees, target_rows, reads) -> dict[str, torch.Tensor]:
        """The layer over `[T, hidden]`: rows are `(keys, values)`, `sees` and `reads` say which ones a query sees."""
        own = self._attend("self_attn", self._norm("input_layernorm", embeds), positions, *window_rows, sees)
        x = embeds + own
        normed = self._norm("post_self_attention_layernorm", x)
        read = self._attend("cross_attn", normed, positions, *target_rows, reads)
        x = x + read
        h = self._norm("post_cross_attention_layernorm", x)
        gate = self._linear("mlp.gate_proj", h)
        x = x + self._linear("mlp.down_proj", gate * gate.sigmoid() * self._linear("mlp.up_proj", h))
        return {"hidden": x, "self_attn_out": own, "cross_attn_out": read}


class IndependentNumbers:
    """All quantities of a draft on given texts, by name, each `[T, ...]`.

    Args:
        layer: the draft.
        embedding, head: `[V, hidden]` of the target.
        given: ids, positions and the target's rows, as `layer_numbers.given_for` makes them.
    """

    def __init__(self, layer: IndependentLayer, embedding: torch.Tensor, head: torch.Tensor, given: dict) -> None:
        self.layer, self.embedding, self.head = layer, embedding, head
        self.given = {name: value[0] for name, value in given.items()}
        self.numbers: dict[str, torch.Tensor] = {}

    def all(self) -> dict[str, torch.Tensor]:
        self._training()
        self._prefill()
        self._chain()
        self._next_round()
        self._tree("tree", "prompt_ids", "step1_token", "target")
        self._long()
        return self.numbers

    def _keep(self, name: str, outputs: dict[str, torch.Tensor], parts=("hidden", "logits")) -> None:
        outputs = {**outputs, "logits": outputs["hidden"] @ self.head.T}
        self.numbers.update({f"{name}_{part}": outputs[part] for part in parts})

    def _rows(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.given[f"{name}_k"], self.given[f"{name}_v"]

    def _whole(self, ids: torch.Tensor, positions: torch.Tensor, target: str, shift: int) -> dict[str, torch.Tensor]:
        """A whole text at once: windows by distance in tokens, target rows 0 .. p - shift."""
        embeds = self.embedding[ids]
        distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        window_rows = self.layer.keys_values(embeds, positions)
        sees = (distance >= 0) & (distance <= WINDOW)
        return self.layer.run(embeds, positions, window_rows, sees, self._rows(target), distance >= shift)

    def _loss(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        log_probs = (hidden @ self.head.T)[:-1].log_softmax(-1)
        return -log_probs[torch.arange(len(ids) - 1), ids[1:]].mean().reshape(1)

    def _training(self) -> None:
        ids = self.given["prompt_ids"]
        for shift in (1, 2, 4):
            outputs = self._whole(ids, torch.arange(len(ids)), "target", shift)
            self._keep(f"train_pad{shift}", outputs, ("hidden", "logits", "self_attn_out", "cross_attn_out"))
            self.numbers[f"train_pad{shift}_loss"] = self._loss(outputs["hidden"], ids)
        for name, shift in (("anchor1", 2), ("anchor2", 1)):
            outputs = self._whole(ids, self.given[f"{name}_position_ids"], f"{name}_target", shift)
            self._keep(name, outputs)
            self.numbers[f"{name}_loss"] = self._loss(outputs["hidden"], ids)

    def _prefill(self) -> None:
        ids = self.given["prompt_ids"]
        positions = torch.arange(len(ids))
        self._keep("prefill", self._whole(ids, positions, "target", 0))
        keys, values = self.layer.keys_values(self.embedding[ids], positions)
        self.numbers |= {"prefill_draft_k": keys, "prefill_draft_v": values}

    def _nodes(self, text, tokens, depths, sees, target):
        """Nodes of a tree below `text`: `sees` `[T, N]` are the nodes (the root first) that each one sees."""
        length = len(text)
        embeds = self.embedding[torch.cat([text, tokens])]
        positions = torch.cat([torch.arange(length), length + depths])
        window_rows = self.layer.keys_values(embeds, positions)
        near = positions[length:, None] - torch.arange(length) <= WINDOW
        rows = self._rows(target)
        reads = torch.ones(len(tokens), len(rows[0]), dtype=torch.bool)
        return self.layer.run(
            embeds[length:], positions[length:], window_rows, torch.cat([near, sees], 1), rows, reads
        )

    def _chain(self) -> None:
        """Steps 1 .. 3, each token the draft's own best; target rows stay those of the prompt."""
        text, chain = self.given["prompt_ids"], self.given["step1_token"]
        for step in range(1, STEPS + 1):
            sees = torch.ones(step, step, dtype=torch.bool).tril()
            outputs = self._nodes(text, chain, torch.arange(step), sees, "target")
            last = {part: value[-1:] for part, value in outputs.items()}
            self._keep(f"step{step}", last, ("hidden", "logits", "self_attn_out", "cross_attn_out"))
            chain = torch.cat([chain, self.numbers[f"step{step}_logits"].argmax(-1)])
        ids = torch.cat([text, chain[:STEPS]])
        keys, values = self.layer.keys_values(self.embedding[ids], torch.arange(len(ids)))
        self.numbers |= {"chain_draft_k": keys, "chain_draft_v": values}

    def _next_round(self) -> None:
        """Three tokens were committed; each reads the target rows before its own position."""
        ids = torch.cat([self.given[name] for name in ("prompt_ids", "step1_token", "next_round_tokens")])
        first = len(ids) - len(self.given["next_round_tokens"])
        positions = torch.arange(len(ids))
        embeds = self.embedding[ids]
        rows = self._rows("next_round_target")
        sees = positions[first:, None] >= positions
        reads = torch.arange(len(rows[0])) < positions[first:, None]
        window_rows = self.layer.keys_values(embeds, positions)
        self._keep("next_round", self.layer.run(embeds[first:], positions[first:], window_rows, sees, rows, reads))

    def _tree(self, name: str, text: str, root: str, target: str) -> None:
        first, second = self.given["tree_d1_tokens"], self.given["tree_d2_tokens"]
        fathers = self.given["tree_d2_fathers"]
        depths = torch.tensor([0] + [1] * len(first) + [2] * len(second))
        sees = torch.eye(len(depths), dtype=torch.bool)
        sees[:, 0] = True
        sees[torch.arange(len(second)) + 1 + len(first), fathers] = True
        tokens = torch.cat([self.given[root], first, second])
        outputs = self._nodes(self.given[text], tokens, depths, sees, target)
        for depth in (1, 2):
            self._keep(f"{name}_d{depth}", {part: value[depths == depth] for part, value in outputs.items()})

    def _long(self) -> None:
        """The window's edge: a text longer than 513 tokens."""
        ids, wanted = self.given["long_prompt_ids"], self.given["long_positions"]
        positions = torch.arange(len(ids))
        for name, shift in (("long_prefill", 0), ("long_train_pad2", 2)):
            outputs = self._whole(ids, positions, "long_target", shift)
            self._keep(name, {part: value[wanted] for part, value in outputs.items()})
        one = torch.ones(1, 1, dtype=torch.bool)
        root = self.given["long_step1_token"]
        self._keep("long_step1", self._nodes(ids, root, torch.zeros(1, dtype=torch.long), one, "long_target"))
        self._tree("window_tree", "long_prompt_ids", "long_step1_token", "long_target")
