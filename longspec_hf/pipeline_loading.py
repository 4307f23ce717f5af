"""`pipeline(..., assistant_model="org/draft")`: a draft that is named is loaded as one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig

from .configuration_longspec import LongSpecDraftConfig
from .modeling_longspec import LongSpecDraftModel
from .placement import draft_device


def wrap_pipeline_loading(original: Callable) -> Callable:
    """A pipeline looks for a named model's class in transformers, and for its tokenizer: a draft has neither."""

    @functools.wraps(original)
    def load_assistant_model(model: Any, assistant_model: Any, assistant_tokenizer: Any) -> Any:
        if isinstance(assistant_model, str):
            config = AutoConfig.from_pretrained(assistant_model)
            if isinstance(config, LongSpecDraftConfig):
                assistant_model = LongSpecDraftModel.from_pretrained(assistant_model, dtype=model.dtype)
                assistant_model = assistant_model.to(draft_device(config, model))
        if isinstance(assistant_model, LongSpecDraftModel) and model.can_generate():
            return assistant_model, None
        return original(model, assistant_model, assistant_tokenizer)

    return load_assistant_model
