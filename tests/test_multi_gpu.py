"""Targets on two GPUs, split by layers or sharded by heads (C49, C50); run with `-m gpu tests/test_multi_gpu.py`."""

import json
import sys
from pathlib import Path

import pytest
import torch
from models import ScriptedDraft, learned, prompt, tiny_target
from test_tensor_parallel import check_texts, make_pair, run_sharded
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from longspec_hf import LongSpecDraftModel
from longspec_hf.hook import CACHE_ARG

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
SIZES = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "initializer_range": 0.1,
}
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
GREEDY = {"do_sample": False, "max_new_tokens": 40}


def split_target(folder, family: str = "llama", head_on: int = 1, **sizes):
    """A target with its first two layers on card 0, the others on card 1."""
    fields = {**SIZES, **sizes}
    if family == "gemma3":
        fields["layer_types"] = ["sliding_attention", "full_attention"] * 2
    tiny_target(family, **fields).save_pretrained(folder)
    layers = {f"model.layers.{layer}": layer // 2 for layer in range(4)}
    parts = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": head_on}
    return AutoModelForCausalLM.from_pretrained(folder, device_map={**parts, **layers}, dtype=torch.float32)


@pytest.mark.parametrize("elsewhere", ["cpu", "cuda:1"])
@pytest.mark.parametrize("inputs_on", ["cuda:0", "cpu"])
def test_a_draft_on_another_device_is_refused_and_works_once_moved(elsewhere, inputs_on):
    """C49."""
    target = tiny_target(**SIZES).to(FIRST)
    draft = learned(target).to(elsewhere)
    ids = prompt(40).to(inputs_on)
    with pytest.raises(
        ValueError, match=rf"is on device {elsewhere}, expected the target's cuda:0.*`draft.to\('cuda:0'\)`"
    ):
        target.generate(ids, assistant_model=draft, **GREEDY)
    plain = target.generate(ids, **GREEDY)
    out = target.generate(ids, assistant_model=draft.to(FIRST), **GREEDY)
    assert out.device == plain.device
    assert torch.equal(out, plain)


def test_a_pair_on_the_second_card_runs_there():
    target = tiny_target(**SIZES).to(SECOND)
    ids = prompt(300).to(SECOND)
    out = target.generate(ids, assistant_model=learned(target), **GREEDY)
    assert torch.equal(out, target.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    ("family", "sizes", "fields"),
    [
        ("llama", {}, {}),
        ("llama", {}, {"draft_vocab_size": 40}),
        ("llama", {}, {"target_layer_idx": 0}),
        ("llama", {}, {"recheck_near_ties": True}),
        ("llama", {"head_on": 0, "tie_word_embeddings": True}, {}),
        ("llama", {"head_on": 0}, {"draft_vocab_size": 40}),
        ("qwen3", {}, {}),
        ("gemma3", {}, {}),
    ],
)
def test_layers_on_two_cards_give_the_same_text(tmp_path, family, sizes, fields):
    """C50: lossless, whatever part lies on the other card; K/V stay on their layer's."""
    target = split_target(tmp_path, family, **sizes)
    draft = learned(target, **fields)
    assert draft.device == (FIRST if "target_layer_idx" in fields else SECOND)
    for length, inputs_on in ((3, FIRST), (40, SECOND), (700, "cpu")):
        ids = prompt(length, seed=length).to(inputs_on)
        plain = target.generate(ids, **GREEDY)
        out = target.generate(ids, assistant_model=draft, return_dict_in_generate=True, **GREEDY)
        assert out.speculation_stats.fallback_reason is None
        assert torch.equal(out.sequences, plain)
        devices = [layer.keys.device for layer in out[CACHE_ARG].layers]
        assert devices == [FIRST, FIRST, SECOND, SECOND]


@pytest.mark.parametrize("mode", ["noisy", "learned"])
def test_batches_and_padding_on_two_cards(tmp_path, mode):
    target = split_target(tmp_path)
    lengths = (5, 40, 300)
    rows = [torch.nn.functional.pad(prompt(n, seed=n), (300 - n, 0)) for n in lengths]
    ids, mask = torch.cat(rows).to(FIRST), torch.tensor([[0] * (300 - n) + [1] * n for n in lengths]).to(FIRST)
    plain = target.generate(ids, attention_mask=mask, **GREEDY)
    draft = learned(target)
    if mode == "noisy":
        draft = ScriptedDraft(target, plain[1].cpu(), mode).to(SECOND)
        draft.script = draft.script.to(SECOND)
    out = target.generate(ids, attention_mask=mask, assistant_model=draft, return_dict_in_generate=True, **GREEDY)
    assert out.speculation_stats.fallback_reason is None
    assert torch.equal(out.sequences, plain)
    one = {"input_ids": ids[:1], "attention_mask": mask[:1], **GREEDY}  # one sequence with padding, some plain steps
    draft = learned(target, fallback_to_plain=True, recheck_near_ties=True)
    assert torch.equal(target.generate(**one, assistant_model=draft), target.generate(**one))


def test_no_keys_and_values_travel_between_cards(tmp_path):
    """C50: what a round copies from card to card is a few rows of hidden states, whatever the context's length."""
    target = split_target(tmp_path / "target")
    draft = learned(target)
    context = target.generate(
        prompt(4000).to(FIRST), assistant_model=draft, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    again = {CACHE_ARG: context[CACHE_ARG], "assistant_model": draft, "return_dict_in_generate": True, **GREEDY}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        out = target.generate(context.sequences, **again)
        torch.cuda.synchronize(FIRST)
        torch.cuda.synchronize(SECOND)
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    # Cards without direct access to each other copy through the host.
    ways = ("PtoP", "HtoD", "DtoH")
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and any(way in e["name"] for way in ways)]
    copied = sum(e["args"]["bytes"] for e in copies)
    layer = out[CACHE_ARG].layers[-1]
    assert layer.keys.shape[2] > 4000
    assert 0 < copied / out.speculation_stats.rounds < 0.1 * (layer.keys.nbytes + layer.values.nbytes)


def test_two_processes_with_a_card_each_commit_what_one_does(tmp_path):
    """Tensor parallel over NCCL."""
    plain = make_pair(tmp_path, "cuda", hidden_size=256, head_dim=64, intermediate_size=512)
    check_texts(run_sharded(Path(sys.executable), tmp_path), plain)


def test_a_loaded_draft_can_be_put_beside_its_layer(tmp_path):
    target = split_target(tmp_path / "target")
    learned(target).save_pretrained(tmp_path / "draft")
    draft = LongSpecDraftModel.from_pretrained(tmp_path / "draft", device_map=SECOND)
    ids = prompt(40).to(FIRST)
    assert torch.equal(target.generate(ids, assistant_model=draft, **GREEDY), target.generate(ids, **GREEDY))
