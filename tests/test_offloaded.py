"""Targets whose weights all lie elsewhere until they are used: the hooks that fetch them are on their leaves."""

from types import SimpleNamespace

import accelerate
import pytest
import torch
from models import learned, prompt, tiny_target

from longspec_hf.placement import draft_device


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("plain_steps", [False, True])
def test_offloaded_targets_give_the_same_text(tmp_path, where, buffers, plain_steps):
    target = tiny_target()
    draft = learned(target, fallback_to_plain=plain_steps)
    options = {"execution_device": torch.device("cpu"), "offload_buffers": buffers}
    if where == "cpu":
        target = accelerate.cpu_offload(target, **options)
    else:
        target = accelerate.disk_offload(target, offload_dir=tmp_path, **options)
    assert all(parameter.is_meta for parameter in target.parameters())
    assert learned(target).device == torch.device("cpu")
    ids = prompt(20)
    plain = target.generate(ids, max_new_tokens=20, do_sample=False)
    out = target.generate(ids, assistant_model=draft, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert out.speculation_stats.rounds > 0 and (out.speculation_stats.plain_steps > 0) == plain_steps


@pytest.mark.parametrize("chained", [False, True])
def test_the_draft_belongs_where_the_leaves_of_its_layer_run(chained):
    target = tiny_target()
    draft = learned(target)
    hook = SimpleNamespace(execution_device=1)
    target.model.layers[1].mlp.up_proj._hf_hook = SimpleNamespace(hooks=[hook]) if chained else hook
    assert draft_device(draft.config, target) == torch.device("cuda:1")
    draft.config.target_layer_idx = 0
    assert draft_device(draft.config, target) == torch.device("cpu")
