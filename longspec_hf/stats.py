"""What a call did: counts, acceptance and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers.generation import GenerateDecoderOnlyOutput


@dataclass
class SpeculationStats:
    """Statistics of one `generate` call.

    Attributes:
        rounds: target forwards over trees.
        row_rounds: the same, each counted once for every sequence in it that had not ended.
        rechecks: further forwards of one token each, which decided near-ties (`recheck_near_ties`).
        plain_steps: forwards of one token a sequence, where speculation did not pay (`fallback_to_plain`), counted as
            `row_rounds` are.
        pauses: how often the call went over to plain steps.
        drafted: tree nodes verified, without the roots.
        committed: new tokens of the output, of all sequences, filling not counted.
        committed_by_prefill: those of them that came from the prefill's logits (1 a sequence), not from a round.
        accepted_per_depth: entry d counts the rounds whose drafted node of depth d + 1 was committed.
        rounds_by_tree: rounds of each tree, by its name: nodes kept at each depth of the beam, and most nodes in all.
        prefill_seconds, decode_seconds: wall time before and after the first new token.
        uncaptured_reason: why rounds on a GPU ran through the target's own forward instead of as captured graphs;
            `None` if they did not, or ran elsewhere.
        fallback_reason: why the call, or a part of it, ran without speculation; `None` if it did not.
    """

    rounds: int = 0
    row_rounds: int = 0
    rechecks: int = 0
    plain_steps: int = 0
    pauses: int = 0
    drafted: int = 0
    committed: int = 0
    committed_by_prefill: int = 0
    accepted_per_depth: list[int] = field(default_factory=list)
    rounds_by_tree: dict[str, int] = field(default_factory=dict)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    uncaptured_reason: str | None = None
    fallback_reason: str | None = None

    @property
    def tau(self) -> float:
        """Mean tokens a sequence committed per target forward of a round, the target's own (bonus) token counted."""
        forwards = self.row_rounds + self.rechecks
        return (self.committed - self.committed_by_prefill - self.plain_steps) / forwards if forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first, over the time after the first."""
        tokens = self.committed - self.committed_by_prefill
        return tokens / self.decode_seconds if self.decode_seconds else 0.0

    def add_round(self, drafted: Sequence[int], committed: Sequence[int], tree: str | None = None) -> None:
        """Count one round.

        Args:
            drafted: per sequence the nodes verified, roots aside.
            committed: per sequence the tokens committed, bonus included.
            tree: its name.
        """
        self.rounds += 1
        if tree is not None:
            self.rounds_by_tree[tree] = self.rounds_by_tree.get(tree, 0) + 1
        self.row_rounds += len(committed)
        self.drafted += sum(drafted)
        self.committed += sum(committed)
        for tokens in committed:
            accepted = tokens - 1
            self.accepted_per_depth += [0] * (accepted - len(self.accepted_per_depth))
            for depth in range(accepted):
                self.accepted_per_depth[depth] += 1

    def add_plain_step(self, sequences: int) -> None:
        """Count one plain step of `sequences` sequences."""
        self.plain_steps += sequences
        self.committed += sequences


@dataclass
class LongSpecGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output of a decoder-only model, with one more field.

    Args:
        speculation_stats: what speculation did in this call.
    """

    speculation_stats: SpeculationStats | None = None
