"""Evaluation: losses by positions, plain positions, tau with and without an evaluation loss."""

import pytest
from models import tiny_target
from runs import random_rows, small_draft, small_trainer

from longspec_hf.training import LongSpecTrainer, LongSpecTrainingArguments, TauEvaluator, TauInput

RAGGED = [{"input_ids": list(range(5, 5 + length))} for length in (4, 30, 45, 1)]


class CountedTau(TauEvaluator):
    """Counts how often tau is measured."""

    def __init__(self):
        super().__init__([TauInput([7, 8, 9], [10, 11, 12, 13])])
        self.times = 0

    def rows(self, *args, **kwargs):
        self.times += 1
        return super().rows(*args, **kwargs)


def _tau_trainer(folder, tau, **arguments) -> LongSpecTrainer:
    target = tiny_target()
    datasets = {name: arguments.pop(name) for name in ("eval_dataset",) if name in arguments}
    settings = {"max_steps": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = LongSpecTrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    return LongSpecTrainer(
        model=small_draft(target), target_model=target, args=args, train_dataset=random_rows(), tau_evaluator=tau,
        **datasets,
    )  # fmt: skip


def test_the_loss_does_not_depend_on_the_batch_size(tmp_path):
    target = tiny_target()
    draft = small_draft(target)
    found = [
        small_trainer(tmp_path, target, draft, per_device_eval_batch_size=size).evaluate(eval_dataset=RAGGED)
        for size in (1, 2, 4)
    ]
    assert [metrics["eval_loss"] for metrics in found] == pytest.approx([found[0]["eval_loss"]] * 3, rel=1e-5)


def test_predict_uses_plain_positions(tmp_path):
    trainer = small_trainer(tmp_path)
    rows = random_rows(2, seed=1)
    expected = trainer.evaluate(rows)["eval_loss"]
    assert [trainer.predict(rows).metrics["test_loss"] for _ in range(2)] == [expected] * 2
    assert trainer.data_collator.max_position == 512


def test_tau_is_measured_at_every_evaluation_without_an_eval_dataset(tmp_path):
    tau = CountedTau()
    trainer = _tau_trainer(tmp_path, tau, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert tau.times == 2
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_tau_beam" in entry]
    assert steps == [2, 4]
    assert not [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def test_the_best_draft_by_tau_alone_is_kept(tmp_path):
    trainer = _tau_trainer(
        tmp_path, CountedTau(), eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="tau_beam", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric >= 1.0


def test_evaluation_of_nothing_is_refused(tmp_path):
    for tau, evaluate_tau in ((None, True), (CountedTau(), False)):
        with pytest.raises(ValueError, match="eval_dataset"):
            _tau_trainer(tmp_path, tau, eval_strategy="steps", eval_steps=2, evaluate_tau=evaluate_tau)


def test_several_datasets_have_tau_measured_once(tmp_path):
    tau = CountedTau()
    trainer = _tau_trainer(tmp_path, tau, eval_dataset={"a": random_rows(4), "b": random_rows(4, seed=1)})
    metrics = trainer.evaluate()
    assert tau.times == 1
    assert [name for name in metrics if name.endswith("tau_beam")] == ["eval_tau_beam"]
    assert {"eval_a_loss", "eval_b_loss"} <= set(metrics)


def test_one_token_documents_contribute_nothing(tmp_path):
    rows = [{"input_ids": [5]}]
    trainer = small_trainer(tmp_path, rows=rows, per_device_train_batch_size=1, max_steps=1)
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert (logged["loss"], logged["ce"], logged["kl"], logged["positions"], logged["grad_norm"]) == (0,) * 5
    assert trainer.evaluate(eval_dataset=rows)["eval_loss"] == 0


def test_data_without_rows_and_padding_without_an_embedding_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is empty, expected at least one row"):
        small_trainer(tmp_path, rows=[])
    target = tiny_target()
    target.config.pad_token_id = -1
    args = LongSpecTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="`pad_token_id` must be a token's id, got -1"):
        LongSpecTrainer(model=small_draft(target), target_model=target, args=args, train_dataset=RAGGED)
    target.config.pad_token_id = 64
    with pytest.raises(ValueError, match="`pad_token_id` is 64, expected a token below the target's vocabulary size"):
        LongSpecTrainer(model=small_draft(target), target_model=target, args=args, train_dataset=RAGGED)
