"""Training in several processes: what cannot work is refused up front, what sharding hides is made whole again."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from ..modeling_longspec import LongSpecDraftModel


def check_deepspeed(args: TrainingArguments) -> None:
    """Raise a `ValueError` where DeepSpeed is asked for and not installed."""
    asked = args.deepspeed is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if asked and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "`deepspeed` is asked for, but the package is not installed. Install it with `pip install deepspeed`, or "
            "use `examples/accelerate/ddp.yaml` or `fsdp2.yaml`, which need nothing more."
        )


@contextmanager
def loaded_whole(args: TrainingArguments) -> Iterator[None]:
    """Inside the block models are loaded whole; once there are arguments for ZeRO-3 it would partition them."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    config = getattr(args, "hf_deepspeed_config", None) or args.deepspeed_plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def check_target(target: PreTrainedModel, processes: int) -> None:
    """Refuse a target of which a process would lack a part.

    Raises:
        ValueError: the message names what made it so.
    """
    if any(hasattr(parameter, "ds_id") for parameter in target.parameters()):
        raise ValueError(
            "`target_model` was partitioned by ZeRO-3 while it was loaded, and nobody would gather its weights. Load "
            "it before the training arguments are made, or inside `with longspec_hf.training.loaded_whole(args):`."
        )
    if _lies_elsewhere(target.get_output_embeddings()):
        raise ValueError(
            "`target_model` has a head that is offloaded or sharded over processes, and the loss needs its rows in "
            "every step. Keep it whole on a device (`device_map`), or quantise the target."
        )
    devices = {str(device) for device in (getattr(target, "hf_device_map", None) or {}).values()}
    if processes > 1 and len(devices) > 1:
        raise ValueError(
            f"`target_model` is split over {sorted(devices)} in each of {processes} processes. Load it whole on the "
            "process's own device (leave `device_map` out), or train in one process."
        )


def check_sharding(model: nn.Module, muon: bool, accelerator: Any) -> None:
    """Refuse ways of sharding `model`, a draft or a draft with adapters, that would fail or write a part of it.

    Raises:
        ValueError: the message names the setting.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        _check_fsdp(plugin, model)
    if muon and getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        raise ValueError(
            "`muon` needs whole matrices, and DeepSpeed hands optimizers flattened parts of them. Leave `muon` off, "
            "or use `examples/accelerate/ddp.yaml` or `fsdp2.yaml`."
        )


def _check_fsdp(plugin: Any, model: nn.Module) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"`fsdp_version` must be 2, got {plugin.fsdp_version}. `examples/accelerate/fsdp2.yaml` has it."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading` is on: the target, which is not sharded, would be loaded in the first "
            "process only and be empty in the others. Switch it off, as `examples/accelerate/fsdp2.yaml` does."
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"`fsdp_state_dict_type` must be FULL_STATE_DICT, got {plugin.state_dict_type}: otherwise no draft is "
            "written that `from_pretrained` can read."
        )
    if not isinstance(model, LongSpecDraftModel):
        raise ValueError(
            f"`model` is a {type(model).__name__}, expected a plain draft under FSDP. Train adapters with "
            "`examples/accelerate/ddp.yaml`."
        )


def whole_draft(draft: LongSpecDraftModel) -> LongSpecDraftModel:
    """The draft, or a copy with complete weights in every process where FSDP2 or ZeRO-3 shards it.

    All processes must call this together.
    """
    parameters = list(draft.parameters())
    partitioned = any(hasattr(parameter, "ds_id") for parameter in parameters)
    if not partitioned and not any(isinstance(parameter, DTensor) for parameter in parameters):
        return draft
    gathered: Any = nullcontext()
    if partitioned:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parameters)
    with gathered:
        tensors = {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for name, tensor in draft.state_dict().items()
        }
    whole = LongSpecDraftModel(draft.config).to(draft.device, draft.dtype)
    whole.load_state_dict(tensors)
    return whole.train(draft.training)


def export_draft(draft: LongSpecDraftModel, folder: str | Path, dtype: torch.dtype, writes: bool) -> None:
    """Write a copy of the draft in `dtype`; all processes call this, those with `writes` write."""
    whole = whole_draft(draft)
    if writes:
        copy.deepcopy(whole).to(dtype).save_pretrained(folder)


def _lies_elsewhere(head: nn.Module) -> bool:
    """Whether the weight of `head` is offloaded, or sharded over processes."""
    weight: Any = getattr(head, "weight", None)
    return isinstance(weight, DTensor) or bool(getattr(weight, "is_meta", False))
