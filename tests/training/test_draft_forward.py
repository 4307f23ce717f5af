"""The draft's forward over a whole text: fast attention equals masked attention; masks and shifts by hand (C88)."""

import pytest
import torch
from models import prompt, tiny_target

from longspec_hf import LongSpecDraftModel
from longspec_hf.draft_attention import (
    blocked_window_attention,
    cross_attention_mask,
    masked_attention,
    shifted_causal_attention,
    shifted_window_attention,
    window_mask,
)
from longspec_hf.target import bind
from longspec_hf.training import read_target

EXACT = 1e-12  # fp64
FP32 = 1e-4  # relative; another kernel, after a cache that another forward wrote


def _qkv(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 6, length, 8), (2, 2, length, 8), (2, 2, length, 8))
    return [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def _same(found, expected, inputs):
    weight = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    gradients = torch.autograd.grad((found * weight).sum(), inputs, allow_unused=True)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        gradient = torch.zeros_like(wanted) if gradient is None else gradient
        torch.testing.assert_close(gradient, wanted, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("length, window", [(5, 8), (8, 8), (9, 8), (17, 8), (40, 7), (3, 1)])
def test_blocked_window_equals_the_mask(length, window):
    inputs = _qkv(length)
    mask = window_mask(length, window, inputs[0].device)
    _same(blocked_window_attention(*inputs, window, 0.3), masked_attention(*inputs, mask, 0.3), inputs)


@pytest.mark.parametrize("length, shift", [(9, 1), (9, 4), (4, 4), (3, 5), (1, 1)])
def test_shifted_causal_equals_the_mask(length, shift):
    inputs = _qkv(length)
    mask = cross_attention_mask(length, shift, inputs[0].device)
    _same(shifted_causal_attention(*inputs, shift, 0.3), masked_attention(*inputs, mask, 0.3), inputs)


@pytest.mark.parametrize("length, shift, window", [(9, 1, 4), (30, 3, 8), (30, 2, 2), (9, 2, 1), (9, 2, 7), (9, 2, 8)])
def test_shifted_window_equals_the_mask(length, shift, window):
    inputs = _qkv(length)
    mask = cross_attention_mask(length, shift, inputs[0].device, target_window=window)
    _same(shifted_window_attention(*inputs, shift, window, 0.3), masked_attention(*inputs, mask, 0.3), inputs)


def test_masks_by_hand():
    window = window_mask(5, 2, torch.device("cpu"))[0, 0].int().tolist()
    assert window == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    cross = cross_attention_mask(4, 2, torch.device("cpu"))[0, 0].int().tolist()
    assert cross == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    narrow = cross_attention_mask(5, 1, torch.device("cpu"), target_window=3)[0, 0].int().tolist()
    assert narrow == [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]


def _forward(draft, length=12, shift=2, mask=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size, heads, dim = draft.config.hidden_size, draft.config.num_key_value_heads, draft.config.head_dim
    shapes = [(2, length, size), (2, length, dim), (2, length, dim), (2, heads, length, dim), (2, heads, length, dim)]
    embeds, cos, sin, key, value = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    value.requires_grad_()
    hidden = draft(embeds, (cos, sin), key, value, attention_mask=mask, cross_attention_shift=shift).last_hidden_state
    return hidden, value


def _draft(**fields):
    torch.manual_seed(0)
    return LongSpecDraftModel.from_target(tiny_target(), sliding_window=4, **fields).double()


def test_a_mask_of_ones_changes_nothing():
    draft = _draft()
    with_mask, _ = _forward(draft, mask=torch.ones(2, 12, dtype=torch.long))
    torch.testing.assert_close(_forward(draft)[0], with_mask, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_a_query_reads_exactly_the_target_rows_up_to_its_shift(shift):
    """Row r of the target's values reaches query p if and only if r <= p - shift."""
    hidden, value = _forward(_draft(), shift=shift)
    for query in range(12):
        (gradient,) = torch.autograd.grad(hidden[:, query].sum(), value, retain_graph=True)
        reached = gradient.abs().sum(dim=(0, 1, 3)) > 0
        assert reached.tolist() == [row <= query - shift for row in range(12)]


class Recorder(LongSpecDraftModel):
    """A draft that notes the hidden state of every node: `seen[position, token]`, of the latest tree."""

    seen: dict[tuple[int, int], torch.Tensor]

    def next_token_logits(self, hidden, head, token_ids, position_ids):
        for place, node in enumerate(zip(position_ids[0].tolist(), token_ids[0].tolist(), strict=True)):
            self.seen.setdefault(node, hidden[0, place].clone())
        return head(hidden)


@pytest.mark.parametrize(
    "family, layer", [("llama", -1), ("mistral", -1), ("phi3", -1), ("gemma3", -1), ("gemma3", 0)]
)
def test_training_sees_what_inference_sees(family, layer):
    """States of a text's tokens in the trees of `generate` equal those of the forward that trains them."""
    target = tiny_target(family)
    torch.manual_seed(1)
    fields = {"sliding_window": 6, "ngram_branch_length": 0, "fallback_to_plain": False, "max_tree_nodes": 80}
    # Every token behind the root, one behind those.
    draft = Recorder.from_target(target, target_layer_idx=layer, tree_shape=[64, 1], **fields)
    draft.seen = found = {}
    ids = prompt(20)
    text = target.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=draft)
    bound = bind(draft, target)
    assert bound.layer_window == (None if family == "llama" or (family, layer) == ("gemma3", -1) else 8)
    positions = torch.arange(44).unsqueeze(0)
    states = read_target(target, bound.layer_idx, text, positions)
    embeds = bound.embed_tokens(text)
    turned = bound.position_embeddings(positions, embeds)
    compared, window = 0, bound.layer_window
    with torch.no_grad():
        by_shift = [
            draft(embeds, turned, *states[:2], cross_attention_shift=shift, target_window=window) for shift in (1, 2)
        ]
    for position, token in enumerate(text[0].tolist()):
        if (state := found.get((position, token))) is not None:
            gaps = [float((state - out.last_hidden_state[0, position]).norm() / state.norm()) for out in by_shift]
            assert min(gaps) < FP32, (position, gaps)  # the root has shift 1, a child of it 2
            compared += 1
    assert compared >= 20


def test_gradient_checkpointing_gives_equal_gradients():
    """C97: on the layer alone; the trainer's own run is in test_trainer."""
    gradients = []
    for checkpointing in (False, True):
        draft = _draft().train()
        if checkpointing:
            draft.gradient_checkpointing_enable()
        _forward(draft)[0].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in draft.named_parameters()})
    assert all(gradient is not None for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=EXACT, atol=EXACT)
