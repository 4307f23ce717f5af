"""Interrupted runs go on as uninterrupted ones would: offsets, clock, and what the card counts (C95)."""

import time

import pytest
import torch
from runs import losses, random_rows, small_trainer
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from longspec_hf.training import AnchorOffsetCollator
from longspec_hf.training.facts import training_facts
from longspec_hf.training.resume import read_record


def _watched(trainer) -> list[tuple]:
    """Step, rows and last positions of every batch that `trainer` will learn from."""
    seen = []
    compute_loss = trainer.compute_loss

    def watch(model, inputs, *args, **kwargs):
        rows, positions = inputs["input_ids"][:, 1].tolist(), inputs["position_ids"][:, -1].tolist()
        seen.append((trainer.state.global_step, tuple(rows), tuple(positions)))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watch
    return seen


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (20, {"gradient_accumulation_steps": 2}),
        (18, {}),
        (16, {"dataloader_num_workers": 2}),
        (20, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
    ],
    ids=["epochs of two and a half steps", "epochs that end with half a batch", "workers", "workers that stay"],
)
def test_a_resumed_run_sees_the_same_batches(tmp_path, rows, settings):
    settings = {"rows": random_rows(rows), "max_steps": 12, **settings}
    straight = small_trainer(tmp_path / "a", **settings)
    expected = _watched(straight)
    straight.train()
    small_trainer(tmp_path / "b", save_strategy="steps", save_steps=8, **settings).train()
    resumed = small_trainer(tmp_path / "b", **settings)
    found = _watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-8"))
    assert found == [batch for batch in expected if batch[0] >= 8]
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_what_one_process_draws(tmp_path, persistent):
    settings = {"rows": random_rows(20), "max_steps": 13}
    alone = small_trainer(tmp_path, **settings)
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
    several = small_trainer(tmp_path, **settings, **workers)
    expected, found = _watched(alone), _watched(several)
    alone.train()
    several.train()
    assert found == expected
    assert len({batch[2] for batch in found}) == 13  # no epoch repeats another's offsets


def test_a_short_batch_at_the_end_draws_offsets_of_its_own():
    row = {"input_ids": list(range(1, 25))}
    collator, known = AnchorOffsetCollator(0, 512, seed=5), AnchorOffsetCollator(0, 512, seed=5, batch_size=4)
    full = [collator([row] * 4)["position_ids"] for _ in range(17)]
    collator.set_batches_drawn(16)
    known.set_batches_drawn(16)
    assert torch.equal(collator([row] * 2)["position_ids"], full[16][:2])
    assert torch.equal(known([row] * 2)["position_ids"], full[16][:2])


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        return iter(list(random_rows(80)))


def test_a_resumed_run_on_a_stream_sees_the_same_batches(tmp_path):
    settings = {"rows": Stream(), "max_steps": 8, "gradient_accumulation_steps": 2}
    straight = small_trainer(tmp_path / "a", **settings)
    expected = _watched(straight)
    straight.train()
    small_trainer(tmp_path / "b", save_strategy="steps", save_steps=4, **settings).train()
    resumed = small_trainer(tmp_path / "b", **settings)
    found = _watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert found == [batch for batch in expected if batch[0] >= 4]


class _Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        time.sleep(0.02)


class _Interrupted(TrainerCallback):
    def on_save(self, args, state, control, **kwargs) -> None:
        raise KeyboardInterrupt


def _rates(trainer, after: int = 0) -> list[float]:
    return [e["learning_rate"] for e in trainer.state.log_history if "loss" in e and e["step"] > after]


def test_a_resumed_run_has_what_is_left_of_its_time(tmp_path):
    budget = {"max_steps": 100_000, "max_train_seconds": 3.0}
    first = small_trainer(tmp_path, save_strategy="steps", save_steps=10, **budget)
    first.add_callback(_Slow())
    first.add_callback(_Interrupted())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    record = read_record(first.state)
    assert record["seconds"] >= record["budget_seconds"] > 10 * 0.02
    resumed = small_trainer(tmp_path, **budget)
    resumed.add_callback(_Slow())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    rates = _rates(resumed, after=10)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] <= _rates(first)[-1]  # it does not begin at the top again
    (runtime,) = (entry["train_runtime"] for entry in resumed.state.log_history if "train_runtime" in entry)
    seconds = training_facts(resumed.args, resumed.state)["seconds"]
    assert seconds == pytest.approx(runtime + record["seconds"])
    assert seconds >= 3.0


def test_training_again_begins_a_budget_anew(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=100_000, max_train_seconds=1.0)
    for _ in range(2):
        trainer.train()
        assert trainer.state.global_step > 2
        assert _rates(trainer)[0] > 0.9e-2


def test_a_resumed_run_counts_all_tokens(tmp_path):
    settings = {"max_steps": 10, "logging_steps": 4}
    straight = small_trainer(tmp_path / "a", **settings)
    straight.train()
    small_trainer(tmp_path / "b", save_strategy="steps", save_steps=6, **settings).train()
    resumed = small_trainer(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-6"))
    expected, found = (training_facts(trainer.args, trainer.state) for trainer in (straight, resumed))
    assert expected["tokens"] == 10 * 4 * 23
    for name in ("steps", "tokens", "final_cross_entropy", "final_kl"):
        assert found[name] == expected[name]


def test_training_again_repeats_the_run(tmp_path):
    """Shifts do not depend on a run that came before."""
    trainer = small_trainer(tmp_path, max_steps=1, learning_rate=0.0, max_cross_attention_shift=50)
    found = []
    for _ in range(2):
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]
