"""The drafts published with the paper, and a card for each: how to convert it, how to use it, what is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

from .model_card import PAPER, make_card_data
from .published import PUBLISHED_PAIRS, PublishedPair
from .training.recorded_card import describe, read_rows, tau_table
from .training.tau import summarize

UNVERIFIED = "unknown"
LICENSES = {"sail/longspec-longchat-13b-16k": "mit", "sail/longspec-QwQ-32B-Preview": "mit"}
"""Licences that the pages of the checkpoints state, where that was seen."""
NOTES = {
    "sail/longspec-longchat-13b-16k": "The target's config.json gives its position scaling as `rope_condense_ratio: "
    "8`, which transformers does not read, and 2048 positions. Give the target's configuration a linear scaling by 8 "
    "before you trust it, with or without a draft, beyond 2048 tokens.",
}
"""What a user of a pair should know, by draft."""


@dataclass(frozen=True)
class PublishedDraft:
    """A published checkpoint as its card presents it.

    Attributes:
        pair: the checkpoint and the model it drafts for.
        license: what the checkpoint's page states.
        note: what a user of this pair should know.
    """

    pair: PublishedPair
    license: str = UNVERIFIED
    note: str | None = None

    @property
    def source(self) -> str:
        """Hub id of the checkpoint."""
        return self.pair.draft

    @property
    def target(self) -> str:
        """Hub id of the model it drafts for."""
        return self.pair.target

    @property
    def name(self) -> str:
        """Name of the converted draft's folder."""
        return self.source.split("/")[1]


PUBLISHED_DRAFTS = tuple(
    PublishedDraft(pair, LICENSES.get(pair.draft, UNVERIFIED), NOTES.get(pair.draft)) for pair in PUBLISHED_PAIRS
)


def make_published_card(draft: PublishedDraft, taus: Sequence[str | Path] = ()) -> ModelCard:
    """The card of a converted draft.

    Args:
        draft: one of `PUBLISHED_DRAFTS`.
        taus: CSV files of `examples/evaluate_tau.py measure` with this pair. Nothing else fills the results.
    """
    rows = [row for path in taus for row in read_rows(path)]
    figures = {tree.removeprefix("tau_"): value for tree, value in summarize(rows).items()}
    evaluation = describe(rows) if rows else None
    data = make_card_data(draft.name, draft.target, draft.license, figures, evaluation)
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {draft.name}",
        f"The [LongSpec]({PAPER}) draft [`{draft.source}`](https://huggingface.co/{draft.source}) for "
        f"`{draft.target}`, as longspec-hf loads it. The weights are the authors'; this folder holds none. The draft "
        "is one decoder layer that proposes tokens, so that the target generates the same text in fewer forwards; it "
        "has no embeddings and no head of its own and cannot be used alone.",
        _convert(draft),
        _use(draft),
        tau_table(rows, "Tau") if rows else _nothing_measured(),
    ]
    if draft.note:
        sections.append(f"## Known of this pair\n\n{draft.note}")
    sections.append(_license(draft))
    return ModelCard("\n\n".join(sections) + "\n")


def _convert(draft: PublishedDraft) -> str:
    return (
        "## Convert\n\nThe published file has another layout. Once:\n\n```bash\npip install longspec-hf accelerate\n"
        f"longspec-hf convert {draft.source} --target {draft.target} --output {draft.name}\n```"
    )


def _use(draft: PublishedDraft) -> str:
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM\n\nimport longspec_hf\n\n"
        f'name = "{draft.target}"\n'
        'target = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="cuda")\n'
        f'draft = longspec_hf.LongSpecDraftModel.from_pretrained("{draft.name}", dtype=target.dtype)\n'
        "target.generate(**inputs, assistant_model=draft.to(target.device))\n```"
    )


def _nothing_measured() -> str:
    return (
        "## Results\n\nNone. Neither tau nor speed of this pair has been measured with longspec-hf; the authors' "
        "figures are in the paper. Results are put here from CSV files of `examples/evaluate_tau.py measure` only."
    )


def _license(draft: PublishedDraft) -> str:
    page = f"https://huggingface.co/{draft.source}"
    if draft.license == UNVERIFIED:
        said = f"The licence of the published weights has not been checked; see [their page]({page})."
    else:
        said = f"[The page of the published weights]({page}) states `{draft.license}`."
    return f"## Licence\n\n{said} The target has a licence of its own."
