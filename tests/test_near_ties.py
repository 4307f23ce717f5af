"""bf16: verification multiplies other shapes than one-token decoding, so the target's near-ties may fall otherwise."""

import torch
from models import learned, prompt, tiny_target

ULPS = 2  # a gap of two units in the last place of bf16 is within the rounding of one product


def bf16_ulp(x: torch.Tensor) -> torch.Tensor:
    """Distance from x to the next bf16 value."""
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=1e-30))) - 7)


def test_a_first_difference_lies_at_a_near_tie():  # C03
    model = tiny_target(dtype=torch.bfloat16)
    draft = learned(model, tree_shape=[3, 3])
    equal, gaps = 0, []
    for seed in range(30):
        ids = prompt(5 + seed, seed=seed)
        plain = model.generate(ids, max_new_tokens=40, do_sample=False)
        ours = model.generate(ids, max_new_tokens=40, do_sample=False, assistant_model=draft)
        if torch.equal(plain, ours):
            equal += 1
            continue
        first = int((plain != ours).flatten().nonzero()[0])
        top = model(plain[:, :first]).logits[0, -1].topk(2).values.detach()
        gaps.append((seed, first, float((top[0] - top[1]) / bf16_ulp(top[0]))))
    assert all(gap < ULPS for *_, gap in gaps), gaps
    assert equal > 10
