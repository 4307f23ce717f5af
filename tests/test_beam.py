"""The beam's maths against brute force."""

import torch

from longspec_hf.beam import Beam, best_children, children_visibility


def test_best_children_over_all_nodes():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([[0.0, -1.0, -0.5], [-2.0, 0.0, -9.0]])
    summed = (scores.unsqueeze(-1) + logits.log_softmax(-1)).flatten(1)
    for width in (1, 4, 21, 50):
        best, parent, token = best_children(scores, logits, width)
        expected = summed.topk(min(width, 21), dim=1)
        torch.testing.assert_close(best, expected.values)
        assert torch.equal(parent * 7 + token, expected.indices)


def test_a_temperature_divides_the_logits_of_all_nodes():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([[0.0, -1.0, -0.5], [-2.0, 0.0, -9.0]])
    cooler, expected = best_children(scores, logits, 9, temperature=0.5), best_children(scores, 2 * logits, 9)
    torch.testing.assert_close(cooler, expected)
    assert not torch.equal(cooler[2], best_children(scores, logits, 9)[2])


def test_children_see_what_their_parent_sees_and_themselves():
    visible = torch.tensor([[[True, True, False], [True, False, True]]])
    got = children_visibility(visible, torch.tensor([[1, 0, 1]]))[0]
    assert got.int().tolist() == [[1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1]]


def test_depths_follow_the_widths():
    ids = torch.zeros(2, 4, dtype=torch.long)
    assert Beam(ids, ids, ids.float(), (1, 3)).depths.tolist() == [[1, 2, 2, 2]] * 2
    assert Beam.empty(2, torch.device("cpu")).depths.shape == (2, 0)
