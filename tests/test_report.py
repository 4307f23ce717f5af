"""Statistics in words."""

from longspec_hf import SpeculationStats
from longspec_hf.report import describe


def test_a_speculated_call():
    counts = {"rounds": 3, "committed": 8, "committed_by_prefill": 1, "accepted_per_depth": [2, 1, 1]}
    stats = SpeculationStats(**counts, prefill_seconds=1.5, decode_seconds=2.0)
    assert describe(stats, 900, seconds=99.0).splitlines() == [
        "900 prompt tokens, 8 new; prefill 1.50 s, decode 2.00 s, 3.5 tokens/s",
        f"tau {stats.tau:.2f}; 3 rounds, accepted per depth: 2 1 1",
    ]


def test_trees_are_named_where_there_were_several():
    stats = SpeculationStats(committed=1, committed_by_prefill=1)
    stats.add_round([3], [2], "4-4-4, 8 nodes")
    assert "by tree" not in describe(stats, 9, seconds=1.0)
    for tree in ("2-2, 4 nodes", "4-4-4, 8 nodes"):
        stats.add_round([3], [2], tree)
    assert describe(stats, 9, seconds=1.0).splitlines()[-1] == "rounds by tree: 4-4-4, 8 nodes: 2; 2-2, 4 nodes: 1"


def test_a_plain_call():
    stats = SpeculationStats(committed=30, fallback_reason="the batch has 3 rows")
    assert describe(stats, 12, seconds=2.0).splitlines() == [
        "12 prompt tokens, 30 new; 2.00 s in all, 15.0 tokens/s",
        "without speculation: the batch has 3 rows",
    ]
