"""Heads of any make: the draft scores tokens as its target's own forward does, over every draft vocabulary."""

import pytest
import torch
from heads import HEADS, target_with_head
from models import VOCAB, ScriptedDraft, learned, prompt, tiny_target

from longspec_hf.fallback import reason_of_modules
from longspec_hf.target import bind
from longspec_hf.target_head import TargetHead

CLOSE = 1e-5  # relative to the largest score; fp32 in another order
BY_WHOLE_FORWARD = "dynamic int8"


def hidden_states(rows: int = 5, size: int = 32) -> torch.Tensor:
    return torch.randn(1, rows, size, generator=torch.Generator().manual_seed(0))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE * float(expected.abs().max()))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("draft_vocab_size", [None, 16])
@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_scores_are_the_targets(kind, draft_vocab_size, tied):
    model = target_with_head(kind, tie_word_embeddings=tied)
    draft = learned(model, draft_vocab_size=draft_vocab_size)
    chosen = torch.arange(VOCAB)
    if draft_vocab_size is not None:
        chosen = torch.arange(3, 51, 3)
        draft.draft_token_ids.copy_(chosen)
    bound, hidden = bind(draft, model), hidden_states()
    expected = model.lm_head(model.model.norm(hidden))[..., chosen]
    assert_close(bound.logits(hidden), expected)
    if kind != BY_WHOLE_FORWARD:
        weight, bias = bound.head.matrix(32, torch.float32, torch.device("cpu"))
        assert weight.shape == (len(chosen), 32)
        assert_close(torch.nn.functional.linear(model.model.norm(hidden), weight, bias), expected)


def test_the_matrix_of_a_dynamically_quantised_head_is_its_weights():
    model = target_with_head(BY_WHOLE_FORWARD)
    weight, bias = bind(learned(model), model).head.matrix(32, torch.float32, torch.device("cpu"))
    assert_close(weight, model.lm_head.weight().dequantize())
    assert bias is None


@pytest.mark.parametrize("draft_vocab_size", [None, 16])
@pytest.mark.parametrize("kind", HEADS)
def test_the_text_is_plains(kind, draft_vocab_size):  # C11
    model = target_with_head(kind)
    for seed in range(2):
        ids = prompt(9, seed=seed)
        plain = model.generate(ids, max_new_tokens=20, do_sample=False)
        drafts = [learned(model, draft_vocab_size=draft_vocab_size)]
        drafts += [] if draft_vocab_size else [ScriptedDraft(model, plain, mode) for mode in ("wrong", "noisy")]
        for draft in drafts:
            out = model.generate(
                ids, max_new_tokens=20, do_sample=False, assistant_model=draft, return_dict_in_generate=True
            )
            assert torch.equal(plain, out.sequences)
            reason = out.speculation_stats.fallback_reason
            assert ("dynamically quantised" in reason) if kind == BY_WHOLE_FORWARD else reason is None


def test_a_head_that_is_gathered_for_its_forward_is_left_whole():
    """ZeRO-3 leaves an empty weight behind; no row of it can be picked before the call is decoded plainly."""
    head = torch.nn.Linear(32, VOCAB, bias=False)
    head.weight.data = torch.empty(0)
    assert TargetHead.of(head, VOCAB, torch.tensor([3, 5]), torch.device("cpu")).weight is None


class Linear8bitLt(torch.nn.Linear):
    """What a fallback knows of the bitsandbytes layer: its name and the threshold in its state."""

    class state:
        threshold = 6.0


def test_outliers_found_in_the_whole_forward_are_a_reason():
    model = tiny_target()
    assert reason_of_modules(model) is None
    model.model.layers[1].mlp.up_proj = Linear8bitLt(32, 64)
    assert "llm_int8_threshold" in reason_of_modules(model)
    Linear8bitLt.state.threshold = 0.0
    assert reason_of_modules(model) is None


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_rows_that_pad_a_head_are_never_proposed(kind):  # C45
    """72 rows for a vocabulary of 64: the embeddings have no such tokens."""
    model = tiny_target()
    padded = torch.nn.Linear(32, 72, bias=False)
    torch.nn.init.zeros_(padded.weight)
    padded.weight.data[:VOCAB] = model.lm_head.weight.data
    model.lm_head = padded
    model = HEADS[kind](model)
    draft = learned(model, tree_shape=[72, 4], max_tree_nodes=128)
    assert bind(draft, model).logits(hidden_states()).shape[-1] == VOCAB
    plain = model.generate(prompt(9), max_new_tokens=20, do_sample=False)
    assert torch.equal(plain, model.generate(prompt(9), max_new_tokens=20, do_sample=False, assistant_model=draft))
