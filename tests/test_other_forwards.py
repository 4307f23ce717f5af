"""Targets whose plain forwards hold more than a tree's: decoded plainly with the reason, or verified with it."""

import copy
import functools

import peft
import pytest
import torch
from models import SIZES, learned, prompt, tiny_target
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DogeConfig,
    FalconH1Config,
    LlamaForCausalLM,
    NemotronConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2MoeConfig,
)

from longspec_hf import tree_probe
from longspec_hf.hook import CACHE_ARG

WINDOWS = {"sliding_window": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
STATE = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}


def model_of(config, **fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**{**SIZES, "pad_token_id": 0, **fields})).eval()


def both(model, draft=None, **kwargs):
    """Tokens without and with a draft, and the reason of the call with it."""
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    if "inputs_embeds" not in options:
        options.setdefault("input_ids", prompt(13))
    draft = learned(model) if draft is None else draft
    torch.manual_seed(3)
    plain = model.generate(**options).sequences
    torch.manual_seed(3)
    out = model.generate(**options, assistant_model=draft)
    return plain, out.sequences, out.speculation_stats.fallback_reason


def randomised(model):
    torch.manual_seed(3)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("config", "fields", "reason"),
    [
        (NemotronConfig, {}, "do not pass on what a tree is"),
        (DogeConfig, {"keep_window_size": 6}, "masks of their own"),
        (FalconH1Config, STATE, "layers of type"),
        (PhimoeConfig, {"num_local_experts": 4, **WINDOWS}, None),
        (
            Qwen2MoeConfig,
            {**MOE, **WINDOWS, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
            None,
        ),
    ],
)
def test_families_that_give_their_attention_no_tree_or_no_window(config, fields, reason):
    plain, tokens, found = both(model_of(config, **fields))
    assert torch.equal(plain, tokens)
    assert found is None if reason is None else reason in found


def test_a_family_is_tried_once_for_each_attention(monkeypatch):
    model = model_of(NemotronConfig)
    draft, tried = learned(model), []
    original = tree_probe._try
    monkeypatch.setattr(tree_probe, "_try", lambda *args: tried.append(args) or original(*args))
    for attention in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(attention)
        both(model, draft)
    assert len(tried) == 2
    both(tiny_target())
    assert len(tried) == 2, "a known family needs no trial"


def test_a_trial_that_fails_is_a_reason(monkeypatch):
    model = model_of(NemotronConfig)
    forward = type(model).forward
    taken = []

    def failing(self, *args, **kwargs):
        if tree_probe.TREE_KWARG in kwargs:
            taken.append(1)
            raise RuntimeError("no such layer")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", failing)
    plain, tokens, reason = both(model)
    assert torch.equal(plain, tokens) and taken and "no such layer" in reason


@pytest.mark.parametrize("length", [20, 33, 60])
def test_phi3_where_its_rotary_table_changes(length):
    """Beyond the change Phi-3 leaves the call's cache and makes one of its own."""
    halves = [1.0] * (SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": halves,
        "long_factor": [4.0 * x for x in halves],
    }
    rope["original_max_position_embeddings"] = 32
    model = model_of(
        Phi3Config, original_max_position_embeddings=32, max_position_embeddings=256, rope_parameters=rope
    )
    plain, tokens, reason = both(model, input_ids=prompt(length))
    assert torch.equal(plain, tokens)
    assert reason is None if length > 32 else "rotary table" in reason


@pytest.mark.parametrize(
    ("kind", "shape"),
    # A dynamic table remembers the longest text: with a long row two plain calls differ too.
    [("dynamic", "embeds"), ("dynamic", "turn"), *(("longrope", s) for s in ("embeds", "turn", "padding", "batch"))],
)
def test_rotary_tables_that_depend_on_the_length_are_recognised_by_real_lengths(kind, shape):
    limit = 32
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": limit}
    if kind == "longrope":
        halves = [1.0] * (SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2)
        rope |= {"short_factor": halves, "long_factor": [4.0 * x for x in halves]}
    model = tiny_target(rope_parameters=rope, max_position_embeddings=limit if kind == "dynamic" else 256)
    ids, mask = prompt(25), None
    kwargs = {}
    if shape == "embeds":
        kwargs = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
    elif shape == "turn":
        first = model.generate(ids[:, :20], max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache = first[CACHE_ARG]
        rows = torch.ones(1, cache.get_seq_length() + 4, dtype=torch.long)
        plain, drafted = (
            model.generate(
                prompt(4, seed=9),
                attention_mask=rows,
                **{CACHE_ARG: copy.deepcopy(cache)},
                max_new_tokens=24,
                do_sample=False,
                return_dict_in_generate=True,
                **given,
            )
            for given in ({}, {"assistant_model": learned(model)})
        )
        assert torch.equal(plain.sequences, drafted.sequences)
        assert "rotary table" in drafted.speculation_stats.fallback_reason
        return
    else:
        other = torch.cat([torch.zeros(1, 12, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(1, 12, dtype=torch.long), torch.ones_like(ids)], 1)
        if shape == "batch":
            other, mask = torch.cat([other, prompt(37)]), torch.cat([mask, torch.ones_like(mask)])
        kwargs = {"input_ids": other, "attention_mask": mask}
    plain, tokens, reason = both(model, **kwargs)
    assert torch.equal(plain, tokens) and "rotary table" in reason


class Biased(LlamaForCausalLM):
    def forward(self, *args, bias_token=None, **kwargs):
        out = super().forward(*args, **kwargs)
        if bias_token is not None:
            out.logits[..., bias_token] += 20.0
        return out


def test_inputs_of_every_forward_are_not_left_out():
    model = Biased(tiny_target().config).eval()
    plain, tokens, reason = both(model, bias_token=5)
    assert torch.equal(plain, tokens) and "`bias_token`" in reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), "prompt learning"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), "prompt learning"),
        (
            peft.LoraConfig(
                target_modules=["q_proj", "k_proj"], r=4, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]
            ),
            "activated LoRA",
        ),
        (peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=4, task_type="CAUSAL_LM"), None),
    ],
    ids=["prompt", "prefix", "activated", "lora"],
)
def test_peft_methods_that_speculate_and_that_do_not(config, reason):
    model = randomised(peft.get_peft_model(tiny_target(), copy.deepcopy(config)))
    ids = torch.cat([prompt(9), torch.tensor([[5, 6]]), prompt(2, seed=8)], 1)
    plain, tokens, found = both(model, input_ids=ids)
    assert torch.equal(plain, tokens)
    assert found is None if reason is None else reason in found


def test_adapters_by_row_keep_a_batch_whole():
    def config():
        return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")

    model = peft.get_peft_model(tiny_target(), config())
    model.add_adapter("b", config())
    randomised(model)
    ids = torch.cat([prompt(12, seed=seed) for seed in range(3)])
    plain, tokens, reason = both(model, input_ids=ids, adapter_names=["default", "b", "__base__"])
    assert torch.equal(plain, tokens) and "`adapter_names`" in reason


def test_an_attention_of_the_users_own_is_used(monkeypatch):
    sdpa = AttentionInterface()["sdpa"]

    def hot(module, query, *args, **kwargs):
        return sdpa(module, 3.0 * query, *args, **kwargs)

    AttentionInterface.register("hot", functools.partial(hot))
    try:
        model = tiny_target()
        model.set_attn_implementation("hot")
        plain, tokens, reason = both(model)
    finally:
        AttentionInterface._global_mapping.pop("hot")
    assert torch.equal(plain, tokens) and "'hot'" in reason


def test_a_configuration_that_was_replaced():
    model = tiny_target()
    draft = learned(model)
    model.config = copy.deepcopy(model.config)
    plain, tokens, reason = both(model, draft)
    assert torch.equal(plain, tokens) and "another configuration" in reason


def test_autocast_and_dropout():
    model = tiny_target(attention_dropout=0.3)
    draft = learned(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, tokens, reason = both(model, draft)
    assert torch.equal(plain, tokens) and "`torch.autocast`" in reason
    assert both(model, draft)[2] is None
    plain, tokens, reason = both(model.train(), draft)
    assert torch.equal(plain, tokens) and "drops out" in reason
    assert both(tiny_target().train())[2] is None, "nothing to drop"
