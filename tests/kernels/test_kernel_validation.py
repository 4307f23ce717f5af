"""Every mistake in the arguments raises ValueError and names the argument."""

import pytest
import torch
from longspec_hf_kernels import hybrid_tree_attention

BATCH, HEADS, KV_HEADS, NODES, CAPACITY, SIZE = 2, 4, 2, 3, 16, 8
QUERY = torch.zeros(BATCH, HEADS, NODES, SIZE)
KEY = torch.zeros(BATCH, KV_HEADS, CAPACITY, SIZE)
GOOD = {
    "query": QUERY,
    "key": KEY,
    "value": KEY,
    "prefix_lens": torch.tensor([5, 4]),
    "ancestor_bits": torch.ones(BATCH, NODES, 1, dtype=torch.int64),
    "scale": 1.0,
}
DEPTHS = torch.zeros(BATCH, NODES, dtype=torch.int64)


def test_the_good_call_works():
    assert hybrid_tree_attention(**GOOD).shape == QUERY.shape


@pytest.mark.parametrize(
    "name, change",
    [
        ("query", {"query": QUERY[0]}),
        ("query", {"query": QUERY.long()}),
        ("query", {"query": torch.zeros(BATCH, 3, NODES, SIZE)}),
        ("key", {"key": KEY[..., :4]}),
        ("key", {"key": KEY.half()}),
        ("value", {"value": KEY[:, :, :8]}),
        ("prefix_lens", {"prefix_lens": torch.tensor([5])}),
        ("prefix_lens", {"prefix_lens": torch.tensor([5.0, 4.0])}),
        ("starts", {"starts": torch.tensor([[0, 0]])}),
        ("ancestor_bits", {"ancestor_bits": torch.ones(BATCH, NODES, dtype=torch.int64)}),
        ("ancestor_bits", {"ancestor_bits": torch.ones(BATCH, NODES, 1, dtype=torch.int32)}),
        ("ancestor_bits", {"key_depths": torch.zeros(BATCH, 65, dtype=torch.int64)}),
        ("key_depths", {"ancestor_bits": None, "key_depths": DEPTHS}),
        ("key_depths", {"window": 4, "depths": DEPTHS}),
        ("key_depths", {"key_depths": torch.zeros(1, NODES, dtype=torch.int64)}),
        ("depths", {"window": 4, "key_depths": DEPTHS}),
        ("depths", {"depths": DEPTHS[:, :1]}),
        ("window", {"window": 0, "depths": DEPTHS, "key_depths": DEPTHS}),
        ("scale", {"scale": 0.0}),
        ("softcap", {"softcap": -1.0}),
        ("sinks", {"sinks": torch.zeros(3)}),
        ("sinks", {"sinks": torch.zeros(HEADS, dtype=torch.int64)}),
    ],
)
def test_mistakes_are_named(name, change):
    with pytest.raises(ValueError, match=rf"^`{name}`"):
        hybrid_tree_attention(**(GOOD | change))
