"""Generation on a GPU, where verification and drafting run on the Triton kernel. Run with `pytest -m gpu`."""

import pytest
import torch
from models import ScriptedDraft, learned, prompt, tiny_target

from longspec_hf.text import near_ties

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
        if not torch.equal(plain, out.sequences):
            first = int((plain != out.sequences).flatten().nonzero()[0])
            with torch.no_grad():
                logits = model(plain[:, :first].cuda()).logits[0, -1].float()
            assert near_ties(logits, dtype).item(), (length, first)


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
