"""Generation on a GPU, where verification and drafting run on the Triton kernel. Run with `pytest -m gpu`."""

import pytest
import torch
from models import ScriptedDraft, learned, prompt, tiny_target
from rounding import equal_but_for_rounding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SIZES = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}  # a head size the kernel takes


@pytest.mark.parametrize("inputs_on", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["oracle", "noisy", "wrong", "learned"])
def test_greedy_equals_plain(mode, dtype, inputs_on):
    model = tiny_target(dtype=dtype, initializer_range=0.1, **SIZES).cuda()
    for length in (3, 40, 700):
        ids = prompt(length, seed=length).to(inputs_on)
        kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
        plain = model.generate(ids, **kwargs)
        if mode == "learned":
            draft = learned(model)
        else:
            draft = ScriptedDraft(model, plain.cpu(), mode).cuda()
            draft.script = draft.script.cuda()
        out = model.generate(ids, assistant_model=draft, return_dict_in_generate=True, **kwargs)
        assert out.speculation_stats.fallback_reason is None
        assert equal_but_for_rounding(model, plain, out.sequences), length


def test_padding_chat_turns_and_rechecks():
    model = tiny_target(dtype=torch.float32, **SIZES).cuda()
    ids = prompt(12).cuda()
    padded = torch.cat([torch.zeros_like(ids[:, :4]), ids], dim=1)
    mask = torch.cat([torch.zeros_like(ids[:, :4]), torch.ones_like(ids)], dim=1)
    kwargs = {"max_new_tokens": 30, "do_sample": False}
    plain = model.generate(ids, **kwargs)
    for recheck in (False, True):
        draft = learned(model, recheck_near_ties=recheck)
        out = model.generate(padded, attention_mask=mask, assistant_model=draft, **kwargs)
        assert torch.equal(out[:, 4:], plain)


@pytest.mark.parametrize("mode", ["noisy", "learned"])
def test_rows_of_a_batch_equal_their_solo_runs(mode):
    model = tiny_target(dtype=torch.float32, initializer_range=0.1, **SIZES).cuda()
    lengths = (5, 40, 300)
    alone = [prompt(length, seed=length).cuda() for length in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (300 - row.shape[1], 0)) for row in alone])
    mask = torch.tensor([[0] * (300 - n) + [1] * n for n in lengths]).cuda()
    kwargs = {"max_new_tokens": 40, "do_sample": False}
    plain = model.generate(ids, attention_mask=mask, **kwargs)
    draft = learned(model) if mode == "learned" else ScriptedDraft(model, plain[1].cpu(), mode).cuda()
    if mode == "noisy":
        draft.script = draft.script.cuda()
    out = model.generate(ids, attention_mask=mask, assistant_model=draft, return_dict_in_generate=True, **kwargs)
    assert out.speculation_stats.fallback_reason is None
    assert torch.equal(plain, out.sequences)
    for row, solo in enumerate(alone):
        assert torch.equal(model.generate(solo, **kwargs)[0, -40:], out.sequences[row, -40:])


def test_strict_mode_in_bf16_equals_plain():
    """With near-ties decided again, and hard ones from an exact cache, nothing differs."""
    model = tiny_target(dtype=torch.bfloat16, **SIZES).cuda()
    draft = learned(model, tree_shape=[3, 3], recheck_near_ties=True)
    for seed in range(20):
        ids = prompt(5 + seed, seed=seed).cuda()
        plain = model.generate(ids, max_new_tokens=40, do_sample=False)
        assert torch.equal(plain, model.generate(ids, max_new_tokens=40, do_sample=False, assistant_model=draft)), seed
