"""Muon beside AdamW in one optimizer: each part is torch's own, under one schedule and one checkpoint."""

import copy

import pytest
import torch
from runs import small_trainer
from torch import nn

from longspec_hf.training.facts import training_facts
from longspec_hf.training.muon import MuonWithAdamW


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False))


def _set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _groups(model: nn.Module, lr: float) -> list[dict]:
    return [{"params": list(model.parameters()), "weight_decay": 0.01, "lr": lr}]


def test_matrices_move_as_under_muon_and_vectors_as_under_adamw():
    model, apart = _model(), _model()
    joined = MuonWithAdamW(_groups(model, 0.1), lr=0.1, betas=(0.9, 0.98))
    matrices = [p for p in apart.parameters() if p.ndim == 2]
    vectors = [p for p in apart.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(vectors, lr=0.1, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(3):
        for part, optimizers in ((model, [joined]), (apart, [muon, adamw])):
            _set_gradients(part, step)
            for optimizer in optimizers:
                optimizer.step()
    for ours, theirs in zip(model.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_schedule_reaches_both_parts():
    model = _model()
    optimizer = MuonWithAdamW(_groups(model, 0.1), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _set_gradients(model, 0)
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_loaded_state_is_the_one_that_is_used():
    first = _model()
    optimizer = MuonWithAdamW(_groups(first, 0.1), lr=0.1)
    _set_gradients(first, 0)
    optimizer.step()
    second = copy.deepcopy(first)
    loaded = MuonWithAdamW(_groups(second, 0.5), lr=0.5)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, part in ((first, optimizer), (second, loaded)):
        _set_gradients(model, 1)
        part.step()
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_the_trainer_uses_it_where_asked_and_says_so(tmp_path):
    for muon in (False, True):
        trainer = small_trainer(
            tmp_path, muon=muon, weight_decay=0.01, learning_rate=0.02, lr_scheduler_type="constant"
        )
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, MuonWithAdamW) == muon
        assert all(group["lr"] == 0.02 for group in trainer.optimizer.param_groups)
        assert ("muon" in training_facts(trainer.args, trainer.state)["optimizer"]) == muon


def test_a_torch_without_muon_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    small_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"`muon` needs .* of torch 2.9"):
        small_trainer(tmp_path, muon=True)
