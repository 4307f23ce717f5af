"""bf16: verification multiplies other shapes than one-token decoding, so the target's near-ties may fall otherwise."""

import pytest
import torch
from heads import Int8Linear
from models import ScriptedDraft, learned, prompt, tiny_target

from longspec_hf.hook import CACHE_ARG
from longspec_hf.text import near_ties

ULPS = 2  # a gap of two units in the last place of bf16 is within the rounding of one product


def bf16_ulp(x: torch.Tensor) -> torch.Tensor:
    """Distance from x to the next bf16 value."""
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=1e-30))) - 7)


@pytest.fixture(scope="module")
def plain_texts():
    """A bf16 target, thirty prompts and its texts."""
    model = tiny_target(dtype=torch.bfloat16)
    prompts = [prompt(5 + seed, seed=seed) for seed in range(30)]
    return model, [(ids, model.generate(ids, max_new_tokens=40, do_sample=False)) for ids in prompts]


@pytest.mark.parametrize("recheck", [False, True])
def test_a_first_difference_lies_at_a_near_tie(plain_texts, recheck):  # C03
    """A real draft proposes little that is right; one that knows half of the text has whole paths verified."""
    model, texts = plain_texts
    equal, rechecks, gaps = 0, 0, []
    for seed, (ids, plain) in enumerate(texts):
        fields = {"tree_shape": [3, 3], "recheck_near_ties": recheck}
        draft = ScriptedDraft(model, plain, "noisy", **fields) if seed % 3 else learned(model, **fields)
        out = model.generate(
            ids, max_new_tokens=40, do_sample=False, assistant_model=draft, return_dict_in_generate=True
        )
        rechecks += out.speculation_stats.rechecks
        if torch.equal(plain, out.sequences):
            equal += 1
            continue
        first = int((plain != out.sequences).flatten().nonzero()[0])
        top = model(plain[:, :first]).logits[0, -1].topk(2).values.detach()
        gaps.append((seed, first, float((top[0] - top[1]) / bf16_ulp(top[0]))))
    assert all(gap < ULPS for *_, gap in gaps), gaps
    assert equal == 30 if recheck else equal >= 25, gaps
    assert (rechecks > 0) == recheck


def test_near_ties_are_measured_in_units_of_the_targets_dtype():
    one = torch.tensor([[8.0, 7.9, 1.0]])
    assert near_ties(one, torch.bfloat16).item() and not near_ties(one, torch.float32).item()
    assert not near_ties(torch.tensor([[8.0, 7.7, 1.0]]), torch.bfloat16).item()


def test_rechecking_in_fp32_changes_nothing(target):
    ids = prompt(10)
    plain = target.generate(ids, max_new_tokens=60, do_sample=False)
    for kwargs in ({}, {"repetition_penalty": 1.3}):
        plain = target.generate(ids, max_new_tokens=60, do_sample=False, **kwargs)
        draft = ScriptedDraft(target, plain, "noisy", recheck_near_ties=True)
        assert torch.equal(
            plain, target.generate(ids, max_new_tokens=60, do_sample=False, assistant_model=draft, **kwargs)
        )


def test_positions_decided_again_are_those_of_plain(target, monkeypatch):
    """With every position called a near-tie each token is drawn from a one-token forward."""
    monkeypatch.setattr("longspec_hf.text.NEAR_TIE_ULPS", float("inf"))
    ids = prompt(10)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(13) >= 3).long().unsqueeze(0)
    plain = target.generate(ids, max_new_tokens=30, do_sample=False)
    draft = ScriptedDraft(target, plain, "oracle", recheck_near_ties=True)
    out = target.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=30,
        do_sample=False,
        assistant_model=draft,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, 3:], plain)
    assert out.speculation_stats.rechecks == out.speculation_stats.rounds == 29


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_in_int8(dtype):  # C11
    model = tiny_target(dtype=dtype)
    for part in list(model.modules()):  # the head too
        for name, linear in list(part.named_children()):
            if isinstance(linear, torch.nn.Linear):
                setattr(part, name, Int8Linear(linear))
    for seed in range(4):
        ids = prompt(5 + seed, seed=seed)
        plain = model.generate(ids, max_new_tokens=24, do_sample=False)
        for mode in ("wrong", "noisy"):
            draft = ScriptedDraft(model, plain, mode, recheck_near_ties=dtype is torch.bfloat16)
            assert torch.equal(plain, model.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=draft))


@pytest.mark.parametrize("every", [3, 4, 7])
def test_a_hard_tie_leaves_plains_cache_bit_for_bit(target, monkeypatch, every):
    """Rows that rounds have written are written again, one by one, up to the last tie and none left out."""
    ids = prompt(10)
    plain = target.generate(ids, max_new_tokens=60, do_sample=False, return_dict_in_generate=True)
    draft = ScriptedDraft(target, plain.sequences, "oracle", recheck_near_ties=True)
    ties = []

    def draw_unless_tied(self, logits, ulps=None):
        if ulps is not None:
            ties.append(self.text.length - 1)  # rows of the cache at this tie
            return None
        return None if self.text.length % every == 0 else self.draw(logits)

    monkeypatch.setattr("longspec_hf.text.TokenDrawer.draw_unless_tied", draw_unless_tied)
    out = target.generate(ids, max_new_tokens=60, do_sample=False, assistant_model=draft, return_dict_in_generate=True)
    assert torch.equal(plain.sequences, out.sequences) and len(ties) > 5
    for ours, theirs in zip(out[CACHE_ARG].layers, plain[CACHE_ARG].layers, strict=True):
        assert torch.equal(ours.keys[:, :, : ties[-1] + 1], theirs.keys[:, :, : ties[-1] + 1])
