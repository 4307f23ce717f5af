"""The trainer: what moves, what does not, resume, saving, precision, checkpointing (C95, C96, C97)."""

import json

import pytest
import torch
from models import tiny_target
from runs import batch_of, losses, random_rows, small_draft, small_trainer
from safetensors.torch import load_file

from longspec_hf import LongSpecDraftConfig, LongSpecDraftModel

SAME_RUN = 1e-6  # fp32, the same operations


def _copy(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_every_parameter_of_the_draft_moves_and_none_of_the_target(tmp_path, family):
    target = tiny_target(family)
    trainer = small_trainer(tmp_path, target)
    draft_before, target_before = _copy(trainer.model), _copy(target)
    trainer.train()
    still = [name for name, tensor in draft_before.items() if torch.equal(tensor, trainer.model.state_dict()[name])]
    assert still == []
    assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in target_before.items())


@pytest.mark.parametrize(("muon", "learning_rate"), [(False, 1e-2), (True, 3e-2)])
def test_the_loss_falls(tmp_path, muon, learning_rate):
    trainer = small_trainer(tmp_path, rows=random_rows(rows=8), max_steps=40, muon=muon, learning_rate=learning_rate)
    trainer.train()
    assert sum(losses(trainer)[-5:]) < 0.8 * sum(losses(trainer)[:5])


@pytest.mark.parametrize(("accumulation", "muon"), [(1, False), (2, False), (1, True)])
def test_ten_and_ten_more_are_twenty(tmp_path, accumulation, muon):
    """C95: learning rates, losses and weights of a resumed run are those of an uninterrupted one."""
    settings = {"max_steps": 20, "gradient_accumulation_steps": accumulation, "muon": muon}
    straight = small_trainer(tmp_path / "a", **settings)
    straight.train()
    first = small_trainer(tmp_path / "b", save_strategy="steps", save_steps=10, **settings)
    first.train()
    resumed = small_trainer(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-10"))
    for name in ("loss", "learning_rate", "ce", "kl"):
        wanted, found = ([e[name] for e in t.state.log_history if "loss" in e] for t in (straight, resumed))
        assert len(wanted) == 20
        assert found == pytest.approx(wanted, rel=SAME_RUN)
    for name, tensor in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=SAME_RUN, atol=SAME_RUN)


def test_a_checkpoint_holds_the_draft_only(tmp_path):
    trainer = small_trainer(
        tmp_path, draft=small_draft(tiny_target(), draft_vocab_size=16), save_strategy="steps", save_steps=4
    )
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert set(saved) == set(trainer.model.state_dict())
    assert not [name for name in saved if "embed" in name or "lm_head" in name]
    assert json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())["model_type"] == "longspec"


def test_half_precision_drafts_get_fp32_master_weights(tmp_path):
    """C96: pure-bf16 training would leave the norms at 1.0, as their updates are below bf16's steps."""
    target = tiny_target(dtype=torch.bfloat16)
    draft = small_draft(target)
    assert draft.dtype == torch.bfloat16
    trainer = small_trainer(tmp_path, target, draft, bf16=True, max_steps=50, learning_rate=2e-5)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        if "layernorm" in name:
            moved = (parameter - 1.0).abs().max()
            assert 0 < moved < 2**-8  # less than bf16 could have kept
    trainer.save_model()
    assert LongSpecDraftModel.from_pretrained(tmp_path).dtype == torch.float32


def _gradients(folder, inputs, shifts, **arguments):
    trainer = small_trainer(folder, **arguments)
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    trainer.model.train()
    trainer.loss_sums(trainer.model, inputs, shifts).total.backward()
    return {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


def test_gradient_checkpointing_gives_equal_gradients(tmp_path):
    """C97: the frozen target needs no gradient of its inputs."""
    inputs = batch_of([list(range(1, 20)), list(range(20, 39))])
    plain = _gradients(tmp_path, inputs, [2])
    saved = _gradients(tmp_path, inputs, [2], gradient_checkpointing=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, rtol=SAME_RUN, atol=SAME_RUN)


def test_shift_groups_split_the_batch_by_rows(tmp_path):
    first, second = list(range(1, 20)), list(range(20, 39))
    together = _gradients(tmp_path, batch_of([first, second]), [1, 3])
    apart = [_gradients(tmp_path, batch_of([row]), [shift]) for row, shift in ((first, 1), (second, 3))]
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[0][name] + apart[1][name], rtol=1e-4, atol=1e-4)


def test_accumulated_batches_weigh_by_labelled_positions(tmp_path):
    """Two micro-batches of unequal length give the loss of one batch."""
    rows = [{"input_ids": list(range(1, 4))}, {"input_ids": list(range(10, 40))}]
    one = small_trainer(tmp_path, rows=rows, max_steps=1, per_device_train_batch_size=2, max_cross_attention_shift=1)
    two = small_trainer(
        tmp_path, rows=rows, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        max_cross_attention_shift=1,
    )  # fmt: skip
    for trainer in (one, two):
        trainer.data_collator.max_position = None
        trainer.train()
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_a_time_budget_ends_training_with_the_rate_run_down(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=100_000, max_train_seconds=1.0, warmup_steps=2)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert 2 < trainer.state.global_step < 100_000
    assert rates[0] == pytest.approx(0.5e-2)
    assert max(rates) > 0.9e-2 and rates[-1] < 0.2e-2


def test_evaluation_reports_the_loss(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.eval_dataset = random_rows(rows=4, seed=1)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.data_collator.max_position == 512  # evaluation used another, with plain positions


def test_a_draft_that_does_not_fit_is_refused_before_training(tmp_path):
    draft = LongSpecDraftModel(LongSpecDraftConfig.from_target(tiny_target(hidden_size=64).config))
    with pytest.raises(ValueError, match=r"`hidden_size` is 64, the target's is 32"):
        small_trainer(tmp_path, draft=draft)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ce_weight": -1.0}, r"`ce_weight` must not be negative"),
        ({"loss_temperature": 0.0}, r"`loss_temperature` must be positive"),
        ({"ce_weight": 0.0, "kl_weight": 0.0}, r"`ce_weight` and `kl_weight` are both 0"),
        ({"max_cross_attention_shift": 0}, r"`max_cross_attention_shift` must be at least 1"),
        ({"max_train_seconds": 0.0}, r"`max_train_seconds` must be positive"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, **arguments)
