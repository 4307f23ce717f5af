"""A target, its tokenizer and its draft, loaded together; and prompts as their token ids."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .embedded import embedded_target_folder
from .modeling_longspec import LongSpecDraftModel

EMBEDDED = "embedded"
SHIPPED_DRAFT = "longspec-smollm2-135m-instruct"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Pair:
    """What a call needs: `pair.target.generate(**inputs, assistant_model=pair.draft)`; no draft is plain decoding."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    draft: LongSpecDraftModel | None

    @property
    def context(self) -> int:
        """Longest text the target was made for, in tokens."""
        return self.target.config.get_text_config(decoder=True).max_position_embeddings


def load_pair(
    target: str | os.PathLike = EMBEDDED,
    draft: str | os.PathLike | None = None,
    dtype: str = "auto",
    device: str | torch.device | None = None,
) -> Pair:
    """Load a pair, the draft in the target's dtype and on its device.

    Args:
        target: Hub id, folder, or "embedded" for SmolLM2-135M-Instruct.
        draft: Hub id or folder; by default the shipped one, which fits the embedded target only.
        dtype: one of `DTYPES`; "auto" is the checkpoint's.
        device: of both; by default the first GPU, or the CPU without one.

    Raises:
        ValueError: an argument names nothing that can be loaded; the message says which.
        OSError: the embedded target could not be fetched.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    place = resolve_device(device)
    if draft is None and str(target) != EMBEDDED:
        raise ValueError(
            f"`draft` must name the draft made for `target` ({target}), got None: the shipped draft fits the embedded "
            "target only. Give a Hub id or a folder."
        )
    source = shipped_draft_folder() if draft is None else draft
    layer = _load("draft", source, lambda: LongSpecDraftModel.from_pretrained(source, dtype="auto"))
    folder = _embedded_folder() if str(target) == EMBEDDED else target
    tokenizer = _load("target", target, lambda: AutoTokenizer.from_pretrained(folder))
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model = _load("target", target, lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=wanted))
    return Pair(model.to(place).eval(), tokenizer, layer.to(place, model.dtype).eval())


def shipped_draft_folder() -> Path:
    """Folder of the draft for the embedded target: beside this file in a wheel, in `model_cards` of a checkout.

    Raises:
        ValueError: neither is there.
    """
    here = Path(__file__).parent
    places = (here / "shipped_draft", here.parent / "model_cards" / SHIPPED_DRAFT)
    for place in places:
        if (place / "model.safetensors").exists():
            return place
    raise ValueError(
        f"`draft` was not given and there is no shipped draft in {' or '.join(map(str, places))}. Install the wheel "
        "again or name a draft."
    )


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device called `device`; by default the first GPU, or the CPU without one.

    Raises:
        ValueError: this machine has no such device.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch built without CUDA
        raise ValueError(
            f"`device` must name a device of this machine, got {str(device)!r} ({_first_line(error)}). "
            "`longspec-hf env` lists them."
        ) from error
    return place


def encode_prompts(
    pair: Pair, prompts: list[str], chat: bool | None = None, system: str | None = None
) -> dict[str, torch.Tensor]:
    """Ids and mask `[len(prompts), longest]` of some prompts on the target's device, padded on the left.

    Args:
        pair: whose tokenizer and device to use.
        prompts: user messages, or texts to continue.
        chat: whether to put each into the tokenizer's chat template; by default where it has one.
        system: a system message before each; needs `chat`.

    Raises:
        ValueError: there is no prompt, an empty one, or no chat template where one is asked for.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("`prompts` must be texts that are not empty, got an empty one. Check the file or the pipe.")
    tokenizer = pair.tokenizer
    chat = bool(tokenizer.chat_template) if chat is None else chat
    if chat and not tokenizer.chat_template:
        raise ValueError("`chat` needs a tokenizer with a chat template, this one has none. Leave `chat` off.")
    if system is not None and not chat:
        raise ValueError("`system` needs a chat template, got a plain prompt. Put its text before the prompt.")
    if chat:
        before = [] if system is None else [{"role": "system", "content": system}]
        talks = [[*before, {"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(talks, add_generation_prompt=True, tokenize=False)
    pads = {} if len(prompts) == 1 else {"padding": True, "padding_side": "left"}
    encoded = tokenizer(prompts, add_special_tokens=not chat, return_tensors="pt", **pads)
    return {name: encoded[name].to(pair.target.device) for name in ("input_ids", "attention_mask")}


def _embedded_folder() -> Path:
    try:
        return embedded_target_folder()
    except RuntimeError as error:  # pip's message
        raise OSError(str(error)) from error


def _load(argument: str, name: str | os.PathLike, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"`{argument}` must be a Hub id or a folder of a model, got {str(name)!r}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
