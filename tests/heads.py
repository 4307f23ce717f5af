"""Targets whose heads are made of something else than an ordinary linear layer."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import tiny_target
from transformers import PreTrainedModel


class Int8Linear(torch.nn.Module):
    """Weights in int8 with one scale a row; products in the dtype of the input."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.data
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", torch.round(weight / self.scale).to(torch.int8))

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    return model


def _biased(model: PreTrainedModel) -> PreTrainedModel:
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, model.lm_head.out_features))
    return model


def _int8(model: PreTrainedModel) -> PreTrainedModel:
    model.lm_head = Int8Linear(model.lm_head)
    return model


def _dynamic_int8(model: PreTrainedModel) -> PreTrainedModel:
    """The head alone, so that the layers below stay as they are; its activations share one scale."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch moves it to another package
        model.lm_head = quantize_dynamic(torch.nn.Sequential(model.lm_head), {torch.nn.Linear})[0]
    return model


def _hooked(model: PreTrainedModel) -> PreTrainedModel:
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    return model


def _lora(model: PreTrainedModel) -> PreTrainedModel:
    peft = pytest.importorskip("peft", reason="the extra `train` is not installed")
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=4, init_lora_weights=False)
    return peft.get_peft_model(model, config).get_base_model().eval()


HEADS = {
    "plain": _plain,
    "bias": _biased,
    "int8": _int8,
    "dynamic int8": _dynamic_int8,
    "hook": _hooked,
    "lora": _lora,
}


def target_with_head(kind: str, family: str = "llama", **overrides) -> PreTrainedModel:
    """A tiny target with a head of this kind."""
    torch.manual_seed(7)  # of the adapter
    return HEADS[kind](tiny_target(family, **overrides))
