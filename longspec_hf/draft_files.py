"""What a draft's folder holds: weights that can be read, tokens that exist, and generation settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@contextmanager
def readable_weights(name: str | os.PathLike) -> Iterator[None]:
    """Say of which model it is that a weight file is cut off, or no weight file at all.

    Raises:
        ValueError: safetensors cannot read a file that is read inside the block.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"`pretrained_model_name_or_path` ({name}) must hold whole safetensors files, got one that cannot be read "
            f"({error}). Fetch or save it again; of a repository cloned without git-lfs there are only pointers."
        ) from error


def expect_known_tokens(name: str | os.PathLike, draft_token_ids: torch.Tensor | None, vocab_size: int) -> None:
    """Check the tokens that a draft may propose, `[draft_vocab_size]`.

    Raises:
        ValueError: one of them is no token of the vocabulary.
    """
    if draft_token_ids is None or draft_token_ids.is_meta:
        return
    least, most = (int(end) for end in draft_token_ids.aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"`pretrained_model_name_or_path` ({name}) must hold `draft_token_ids` from 0 to {vocab_size - 1}, got "
            f"{least} to {most}. Train or convert the draft again with the vocabulary of its target."
        )


def write_generation_config(folder: str | os.PathLike, generation_config: GenerationConfig | None) -> None:
    """Write the generation settings of a draft that is saved; without any, remove those of an earlier one."""
    file = Path(folder) / GENERATION_CONFIG_NAME
    if generation_config is not None:
        generation_config.save_pretrained(folder)
    elif file.exists():
        file.unlink()


def read_generation_config(name: str | os.PathLike, arguments: dict[str, Any]) -> GenerationConfig | None:
    """The generation settings saved with a draft, if there are any.

    Args:
        name: folder or Hub id.
        arguments: of `from_pretrained`; those that say where on the Hub are passed on.

    Raises:
        OSError: the folder's file is no JSON object.
    """
    where = {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
    if Path(name).is_dir():
        file = Path(name, where.get("subfolder", ""), GENERATION_CONFIG_NAME)
        return GenerationConfig.from_pretrained(name, **where) if file.exists() else None
    try:
        return GenerationConfig.from_pretrained(name, **where)
    except OSError:  # most drafts have none
        return None
