"""The draft learns from the target's own head, norm, soft-cap and states (C88, C89, C98); round trips (C91, C99)."""

import pytest
import torch
from heads import target_with_head
from models import tiny_target
from runs import batch_of, small_draft, small_trainer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from longspec_hf import LongSpecDraftModel
from longspec_hf.draft_attention import cross_attention_mask, masked_attention, window_mask
from longspec_hf.target import bind
from longspec_hf.training import read_target, set_draft_vocabulary
from longspec_hf.training.positions import anchor_offset_positions

CLOSE = 1e-4  # fp32, two forwards of different kernels


def _naive_sums(draft, target, inputs, shift, vocabulary=None):
    """Cross-entropy and KL sums from whole logits, written with the target's own forward and masked attention."""
    ids, positions, labels = inputs["input_ids"], inputs["position_ids"], inputs["labels"]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        output = target(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True)
    layer = output.past_key_values.layers[-1] if hasattr(output, "past_key_values") else output.cache.layers[-1]
    bound = bind(draft, target, mixed_precision=True)
    embeds = target.get_input_embeddings()(ids)
    cos, sin = bound.position_embeddings(positions, embeds)
    near = window_mask(ids.shape[1], draft.config.sliding_window, ids.device)
    before = cross_attention_mask(ids.shape[1], shift, ids.device)
    scale = draft.config.head_dim**-0.5
    hidden = draft.layer(
        embeds, cos, sin,
        lambda q, k, v: masked_attention(q, k, v, near, scale),
        lambda q, *_: masked_attention(q, layer.keys, layer.values, before, scale),
    )  # fmt: skip
    logits = target.get_output_embeddings()(target.get_decoder().norm(hidden))
    cap = getattr(target.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    teacher = output.logits
    if vocabulary is not None:
        outside = torch.ones(logits.shape[-1], dtype=torch.bool)
        outside[vocabulary] = False
        logits, teacher = (x.masked_fill(outside, -1e9) for x in (logits, teacher))
    ce = kl = torch.zeros(())
    for row, position in (labels[:, 1:] != -100).nonzero().tolist():
        log_q, log_p = logits[row, position].log_softmax(-1), teacher[row, position].log_softmax(-1)
        label = labels[row, position + 1]
        if vocabulary is None or label in vocabulary:
            ce = ce - log_q[label]
        kl = kl + (log_p.exp() * (log_p - log_q)).sum()
    return ce, kl


def _inputs():
    inputs = batch_of(
        [list(range(3, 21)), list(range(30, 48))], [[-100] * 5 + list(range(8, 21)), list(range(30, 48))]
    )
    inputs["position_ids"] = torch.stack([anchor_offset_positions(18, 3, 40), anchor_offset_positions(18, 0, 7)])
    return inputs


@pytest.mark.parametrize("family, tied", [("llama", True), ("llama", False), ("gemma2", True), ("qwen3", False)])
@pytest.mark.parametrize("draft_vocab", [None, 20])
def test_loss_and_gradients_equal_a_naive_implementation(tmp_path, family, tied, draft_vocab):
    target = tiny_target(family, tie_word_embeddings=tied)
    draft = small_draft(target, draft_vocab_size=draft_vocab)
    vocabulary = None
    if draft_vocab is not None:
        vocabulary = torch.arange(2, 42, 2)
        set_draft_vocabulary(draft, vocabulary)
    trainer = small_trainer(tmp_path, target, draft, loss_chunk_elements=64 * 3)
    found = trainer.loss_sums(trainer.model, _inputs(), [2])
    found.total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}
    draft.zero_grad()
    ce, kl = _naive_sums(draft, target, _inputs(), 2, vocabulary)
    torch.testing.assert_close(found.ce, ce.detach(), rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(found.kl, kl.detach(), rtol=CLOSE, atol=CLOSE)
    (trainer.args.ce_weight * ce + trainer.args.kl_weight * kl).backward()
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=CLOSE, atol=CLOSE * parameter.grad.abs().max()
        )


@pytest.mark.parametrize("draft_vocab", [None, 20])
@pytest.mark.parametrize("kind", ["bias", "int8", "hook", "lora"])
def test_heads_of_another_make_give_the_naive_loss(tmp_path, kind, draft_vocab):
    target = target_with_head(kind)
    draft = small_draft(target, draft_vocab_size=draft_vocab)
    trainer = small_trainer(tmp_path, target, draft, loss_chunk_elements=64 * 3)
    found = trainer.loss_sums(draft, _inputs(), [2])
    vocabulary = None if draft_vocab is None else torch.arange(draft_vocab)
    ce, kl = _naive_sums(draft, target, _inputs(), 2, vocabulary)
    torch.testing.assert_close(found.ce, ce.detach(), rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(found.kl, kl.detach(), rtol=CLOSE, atol=CLOSE)
    weight = draft.mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(found.total, weight)
    (wanted,) = torch.autograd.grad(trainer.args.ce_weight * ce + trainer.args.kl_weight * kl, weight)
    torch.testing.assert_close(gradient, wanted, rtol=CLOSE, atol=CLOSE * float(wanted.abs().max()))


def test_the_first_answer_token_is_learned_from_the_last_prompt_state(tmp_path):
    """C88: prompt 5 6 7, answer 8 9, one pad; the states of 7 and 8 learn, no other."""
    trainer = small_trainer(tmp_path, kl_weight=0.0, ce_weight=1.0)
    seen = []
    original = trainer._losses

    def spy(hidden, *args):
        hidden.retain_grad()
        seen.append(hidden)
        return original(hidden, *args)

    trainer._losses = spy
    inputs = batch_of([[5, 6, 7, 8, 9], [5] * 6], [[-100, -100, -100, 8, 9], [-100] * 6])
    trainer.loss_sums(trainer.model, inputs, [1]).total.backward()
    learning = seen[0].grad.abs().sum(-1) > 0
    assert learning.tolist() == [[False, False, True, True, False, False], [False] * 6]


def test_labels_of_another_row_or_of_padding_do_not_matter(tmp_path):
    trainer = small_trainer(tmp_path)
    row = list(range(3, 15))
    alone = trainer.loss_sums(trainer.model, batch_of([row]), [2])
    padded = trainer.loss_sums(trainer.model, batch_of([row, list(range(40, 60))], [row, [-100] * 20]), [2])
    torch.testing.assert_close(padded.total, alone.total, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3"])
def test_states_are_those_of_an_ordinary_forward(family):
    """Positions that jump are no packed texts: states equal a forward with an explicit mask."""
    target = tiny_target(family)
    inputs = _inputs()
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    states = read_target(target, 1, ids, positions)
    with torch.no_grad():
        output = target.get_decoder()(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(states.hidden, output.last_hidden_state, rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(target.get_output_embeddings()(states.hidden), F.linear(
        output.last_hidden_state, target.get_output_embeddings().weight), rtol=CLOSE, atol=1e-3)  # fmt: skip
    assert states.key.shape == states.value.shape == (2, 2, 18, 8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_bit_equal(tmp_path, tied, dtype):
    """C91, C96."""
    draft = small_draft(tiny_target(tie_word_embeddings=tied, dtype=dtype), draft_vocab_size=16)
    set_draft_vocabulary(draft, torch.arange(5, 21))
    draft.save_pretrained(tmp_path)
    loaded = LongSpecDraftModel.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    for name, tensor in draft.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_train_save_load_generate(tmp_path):
    """C99: what the trainer saved is what `generate` reads."""
    target = tiny_target()
    trainer = small_trainer(tmp_path, target, max_steps=2)
    trainer.train()
    trainer.save_model()
    draft = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(draft, LongSpecDraftModel)
    ids = torch.randint(1, 64, (1, 30), generator=torch.Generator().manual_seed(0))
    draft.config.fallback_to_plain = False
    plain = target.generate(ids, max_new_tokens=40, do_sample=False)
    output = target.generate(
        ids, max_new_tokens=40, do_sample=False, assistant_model=draft, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, plain)
    assert output.speculation_stats.fallback_reason is None
