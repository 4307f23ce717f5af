"""The quantities of `independent_layer.py`, computed by the package: training forward, drafting, window."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from longspec_hf import LongSpecCandidateGenerator, LongSpecDraftModel
from longspec_hf.hook import CACHE_ARG
from longspec_hf.settings import TreeSettings
from longspec_hf.target import bind
from longspec_hf.training.losses import FrozenHead, chunked_loss
from longspec_hf.training.target_states import read_target

PROMPT, LONG, LONG_POSITIONS = 40, 600, (511, 512, 513, 514, 599)
ANCHORS = {"anchor1": (3, 17000, 2), "anchor2": (4, 29960, 1)}  # sink tokens, offset, shift
ATTENTIONS = ("self_attn", "cross_attn")


def given_for(target: PreTrainedModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random texts and tokens, and the rows `[1, T, Hkv, D]` of the target's last layer for them."""
    generator = torch.Generator().manual_seed(seed)
    vocab = target.config.vocab_size
    ids = torch.randperm(vocab, generator=generator)[None]  # nodes of one depth differ
    prompt, long = (torch.randint(vocab, (1, length), generator=generator) for length in (PROMPT, LONG))
    given = {
        "prompt_ids": prompt,
        "step1_token": ids[:, :1],
        "next_round_tokens": ids[:, 1:4],
        "next_round_target_tokens": ids[:, :3],
        "tree_d1_tokens": ids[:, 4:7],
        "tree_d2_tokens": ids[:, 7:12],
        "tree_d2_fathers": torch.tensor([[2, 1, 3, 1, 2]]),
        "long_prompt_ids": long,
        "long_positions": torch.tensor([LONG_POSITIONS]),
        "long_step1_token": ids[:, :1],
    }
    plain = torch.arange(LONG)[None]
    texts = {"target": prompt, "next_round_target": torch.cat([prompt, ids[:, :3]], 1), "long_target": long}
    positions = {name: plain[:, : text.shape[1]] for name, text in texts.items()}
    for name, (sink, offset, _) in ANCHORS.items():
        given[f"{name}_position_ids"] = torch.where(plain >= sink, plain + offset, plain)[:, :PROMPT]
        texts[f"{name}_target"], positions[f"{name}_target"] = prompt, given[f"{name}_position_ids"]
    for name, text in texts.items():
        states = read_target(target, target.config.num_hidden_layers - 1, text, positions[name])
        given[f"{name}_k"], given[f"{name}_v"] = (rows.transpose(1, 2) for rows in (states.key, states.value))
    return given


class PackageNumbers:
    """All quantities of `draft` by name, `[1, T, ...]`, from the paths that training and generation take."""

    def __init__(self, draft: LongSpecDraftModel, target: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        self.draft, self.target, self.given = draft, target, given
        self.bound = bind(draft, target)
        self.numbers: dict[str, torch.Tensor] = {}
        self.attended: dict[str, torch.Tensor] = {}
        for name in ATTENTIONS:
            getattr(draft, name).o_proj.register_forward_hook(lambda *a, name=name: self.attended.update({name: a[2]}))

    @torch.no_grad()
    def all(self) -> dict[str, torch.Tensor]:
        self._training()
        self._prefill()
        self._chain()
        self._next_round()
        self._tree("tree", "prompt_ids", "step1_token")
        self._long()
        return self.numbers

    def _keep(self, name: str, hidden: torch.Tensor, attended: bool = False) -> None:
        self.numbers |= {f"{name}_hidden": hidden, f"{name}_logits": self.bound.logits(hidden)}
        if attended:
            self.numbers |= {f"{name}_{part}_out": value for part, value in self.attended.items()}

    def _whole(self, ids: torch.Tensor, positions: torch.Tensor, shift: int) -> torch.Tensor:
        states = read_target(self.target, self.bound.layer_idx, ids, positions)
        embeds = self.bound.embed_tokens(ids)
        cos_sin = self.bound.position_embeddings(positions, embeds)
        return self.draft(embeds, cos_sin, states.key, states.value, cross_attention_shift=shift).last_hidden_state

    def _loss(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        head = FrozenHead(self.bound.head.weight, self.bound.head.bias, self.bound.logit_softcap)
        inputs, labels = hidden[0, :-1], ids[0, 1:]
        sums = chunked_loss(inputs, head, labels, inputs, torch.ones_like(labels, dtype=torch.bool), 1.0, 0.0)
        return (sums.ce / len(labels)).reshape(1)

    def _training(self) -> None:
        ids = self.given["prompt_ids"]
        plain = torch.arange(ids.shape[1])[None]
        runs = {f"train_pad{shift}": (plain, shift) for shift in (1, 2, 4)}
        runs |= {name: (self.given[f"{name}_position_ids"], shift) for name, (_, _, shift) in ANCHORS.items()}
        for name, (positions, shift) in runs.items():
            hidden = self._whole(ids, positions, shift)
            self._keep(name, hidden, attended=name.startswith("train"))
            self.numbers[f"{name}_loss"] = self._loss(hidden, ids)

    def _window_rows(self, name: str, ids: torch.Tensor) -> None:
        embeds = self.bound.embed_tokens(ids)
        cos_sin = self.bound.position_embeddings(torch.arange(ids.shape[1])[None], embeds)
        rows = self.draft.window_keys_values(embeds, *cos_sin)
        self.numbers |= {f"{name}_{kind}": value.transpose(1, 2) for kind, value in zip("kv", rows, strict=True)}

    def _prefill(self) -> None:
        ids = self.given["prompt_ids"]
        self._keep("prefill", self._whole(ids, torch.arange(ids.shape[1])[None], 0))
        self._window_rows("prefill_draft", ids)

    def _propose(self, text, rounds, shape, score=None):
        """Draft below `text` after the committed tokens of each round; what each depth computed, by depth.

        `score` maps (depth, head's logits) to the logits the beam sees; by default they are the draft's own.
        """
        seen: list[dict[str, torch.Tensor]] = []

        def look(hidden, head, token_ids, position_ids):
            seen.append({"hidden": hidden, "tokens": token_ids, **self.attended})
            return head(hidden) if score is None else score(len(seen) - 1, token_ids, head(hidden))

        generator = LongSpecCandidateGenerator(self.draft, self.bound, TreeSettings(shape, 64, 0, 2))
        generator.start(text.tolist(), torch.arange(text.shape[1])[None])
        for committed in rounds:
            generator.append(committed.tolist())
        read = torch.cat([text, *rounds], 1)[:, :-1]
        cache = self.target(read, use_cache=True)[CACHE_ARG]
        self.draft.next_token_logits = look
        try:
            generator.propose(cache, [len(shape)])
        finally:
            del self.draft.next_token_logits
        return seen

    def _chain(self) -> None:
        text = self.given["prompt_ids"]
        seen = self._propose(text, [self.given["step1_token"]], (1, 1, 1))
        for step, outputs in enumerate(seen, start=1):
            self.attended.update({name: outputs[name] for name in ATTENTIONS})
            self._keep(f"step{step}", outputs["hidden"], attended=True)
        self._window_rows("chain_draft", torch.cat([text, *(outputs["tokens"] for outputs in seen)], 1))

    def _next_round(self) -> None:
        """The last row as generation computes it, all rows as training does."""
        text, tokens = self.given["prompt_ids"], self.given["next_round_tokens"]
        whole = torch.cat([text, self.given["step1_token"], tokens], 1)
        hidden = self._whole(whole, torch.arange(whole.shape[1])[None], 1)[:, -tokens.shape[1] :]
        (root,) = self._propose(text, [self.given["step1_token"], tokens], (1,))
        self._keep("next_round", torch.cat([hidden[:, :-1], root["hidden"]], 1))
        self.numbers["next_round_hidden_in_training"] = hidden

    def _tree(self, name: str, text: str, root: str) -> None:
        levels = [self.given["tree_d1_tokens"][0], self.given["tree_d2_tokens"][0]]
        fathers = levels[0][self.given["tree_d2_fathers"][0] - 1]

        def score(depth, token_ids, logits):
            """Only the wanted children are likely."""
            logits = torch.zeros_like(logits)
            for child, token in enumerate(levels[depth]) if depth < 2 else ():
                father = (token_ids[0] == fathers[child]).nonzero().item() if depth == 1 else 0
                logits[0, father, token] = 50.0
            return logits

        shape = (len(levels[0]), len(levels[1]), 1)
        seen = self._propose(self.given[text], [self.given[root]], shape, score)
        for depth, tokens in enumerate(levels, start=1):
            found = seen[depth]["tokens"][0].tolist()
            assert sorted(found) == sorted(tokens.tolist())
            order = [found.index(token) for token in tokens.tolist()]
            self._keep(f"{name}_d{depth}", seen[depth]["hidden"][:, order])

    def _long(self) -> None:
        ids, wanted = self.given["long_prompt_ids"], self.given["long_positions"][0]
        plain = torch.arange(ids.shape[1])[None]
        self._keep("long_prefill", self._whole(ids, plain, 0)[:, wanted])
        self._keep("long_train_pad2", self._whole(ids, plain, 2)[:, wanted])
        (root,) = self._propose(ids, [self.given["long_step1_token"]], (1,))
        self._keep("long_step1", root["hidden"])
        self._tree("window_tree", "long_prompt_ids", "long_step1_token")
