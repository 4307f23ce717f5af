"""The measure by which texts in bf16 may differ on a GPU: bf16 and fp32 texts of one model on a CPU."""

import copy

import torch
from models import prompt, tiny_target
from rounding import equal_but_for_rounding


def test_texts_that_rounding_parts_are_told_from_other_texts():
    parted = 0
    for seed in range(8):
        model = tiny_target(dtype=torch.bfloat16, initializer_range=0.1, seed=seed)
        ids = prompt(20, seed=seed)
        rounded, exact = (
            one.generate(ids, max_new_tokens=48, do_sample=False) for one in (model, copy.deepcopy(model).float())
        )
        parted += not torch.equal(rounded, exact)
        assert equal_but_for_rounding(model, rounded, exact)
        with torch.no_grad():
            ranked = model(rounded[:, :30]).logits[0, -1].argsort(descending=True)
        other = rounded.clone()
        other[0, 30] = ranked[len(ranked) // 4]
        assert not equal_but_for_rounding(model, rounded, other)
    assert parted
