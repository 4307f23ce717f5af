"""The model card of a draft, written from its configuration and from what the run recorded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .configuration_longspec import LongSpecDraftConfig
from .version import __version__

PAPER = "https://arxiv.org/abs/2502.17421"
TASK = "text-generation"


def make_model_card(
    config: LongSpecDraftConfig,
    repo_name: str,
    training: Mapping[str, Any] | None = None,
    taus: Mapping[str, float] | None = None,
    evaluation: str | None = None,
    notes: str | None = None,
    license: str = "apache-2.0",
    base_model: str | None = None,
) -> ModelCard:
    """A model card with valid Hub metadata.

    Args:
        config: the draft's configuration.
        repo_name: name of the draft, its title.
        training: facts of the run by name (steps, tokens, losses, device, versions).
        taus: measured tau by name, such as `beam` or `beam_not_looping`.
        evaluation: what tau was measured on, a few words.
        notes: more Markdown, put before the training section.
        license: of the draft's weights.
        base_model: Hub name of the target; by default the configuration's, where that is one.
    """
    target = base_model or config.target_name_or_path
    data = make_card_data(repo_name, target, license, taus, evaluation)
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_name}",
        f"A [LongSpec]({PAPER}) draft for `{target or 'its target'}`: one decoder layer that proposes tokens, so that "
        "the target generates the same text in fewer forwards. It has no embeddings and no head of its own and cannot "
        "be used alone.",
        _usage(repo_name, target),
        _sizes(config),
    ]
    if taus:
        sections.append(markdown_table("Tau", f"Tokens per target forward, {evaluation or 'held-out texts'}.", taus))
    if notes:
        sections.append(notes.strip())
    if training:
        sections.append(
            markdown_table("Training", f"Trained with `LongSpecTrainer` of longspec-hf {__version__}.", training)
        )
    return ModelCard("\n\n".join(sections) + "\n")


def make_card_data(
    repo_name: str,
    base_model: str | None,
    license: str,
    taus: Mapping[str, float] | None = None,
    evaluation: str | None = None,
) -> ModelCardData:
    """The metadata of a draft's card; arguments as of [`make_model_card`]. A folder's path is no base model."""
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type="held-out",
            dataset_name=evaluation or "held-out texts",
            metric_type="tau",
            metric_name=f"tau, {name.replace('_', ' ')}",
            metric_value=round(float(value), 3),
        )
        for name, value in (taus or {}).items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        license=license,
        base_model=base_model if _is_repo_name(base_model) else None,
        tags=["longspec", "speculative-decoding", "draft-model"],
        model_name=repo_name if results else None,
        eval_results=results or None,
    )


def save_model_card(folder: str | Path, card: ModelCard) -> Path:
    """Write the card as `folder/README.md` and return its path."""
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(card.content, encoding="utf-8")
    return path


def _usage(repo_name: str, target: str | None) -> str:
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM\n\nimport longspec_hf\n\n"
        f'target = AutoModelForCausalLM.from_pretrained("{target or "target"}")\n'
        f'draft = longspec_hf.LongSpecDraftModel.from_pretrained("{repo_name}", dtype=target.dtype)\n'
        "target.generate(**inputs, assistant_model=draft)\n```"
    )


def _sizes(config: LongSpecDraftConfig) -> str:
    names = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
    names += ["sliding_window", "target_layer_idx", "use_target_final_norm", "draft_vocab_size", "tree_shape"]
    names += ["max_tree_nodes", "ngram_branch_length"]
    return markdown_table("Configuration", None, {name: getattr(config, name) for name in names})


def markdown_table(title: str, text: str | None, values: Mapping[str, Any]) -> str:
    """A section of a card: a heading, a sentence and two columns of names and values."""
    rows = "\n".join(f"| {name.replace('_', ' ')} | {_format(value)} |" for name, value in values.items())
    head = f"## {title}\n\n" + (f"{text}\n\n" if text else "")
    return f"{head}| | |\n|---|---|\n{rows}"


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _is_repo_name(name: str | None) -> bool:
    """Whether a name can be a Hub repository's: `owner/name`, neither a folder here nor a path with a drive letter."""
    if name is None or name.count("/") != 1 or os.path.isdir(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
