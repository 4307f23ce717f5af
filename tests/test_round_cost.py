"""What rounds take: the look-up, and what the clock makes of it."""

import random

import pytest

from longspec_hf.round_cost import CPU, GPU, PairTimes, RoundCost, UsualCosts

SHAPES = [(), (4,), (4, 4, 4), (4, 16, 16, 16, 16)]


def seconds(usual, nodes, shape, step=0.02, sequences=1):
    return step * sum(usual.parts(nodes, shape, sequences))


@pytest.mark.parametrize("usual", [CPU, GPU])
def test_more_costs_more_and_a_plain_step_is_one(usual):
    cost = RoundCost(usual)
    assert cost.seconds(1, ()) == 1.0
    times = [cost.seconds(nodes, (4, 4)) for nodes in (2, 4, 7, 8, 16, 30, 64, 100, 200)]
    assert times == sorted(times) and len(set(times)) == len(times)
    assert cost.seconds(8, (4,)) < cost.seconds(8, (4, 4)) < cost.seconds(8, (4, 4, 4))


def test_rows_between_and_beyond_the_table():
    usual = UsualCosts(((8, 1.0), (16, 3.0)), (0.5, 0.25))
    assert usual.parts(8, (), 1) == (1.0, 1.0, 0.0)
    assert usual.parts(12, (), 1)[1] == 2.0 and usual.parts(20, (), 1)[1] == 4.0
    assert usual.parts(1, (4, 2), 1)[2] == (0.5 + 0.25) + (0.5 + 1.0)
    # Eight sequences: a plain step has eight rows, which count as one.
    assert usual.parts(2, (), 8) == (1.0, 2.0 / 2.0, 0.0)


def test_one_kind_of_round_corrects_all():
    cost = RoundCost(CPU)
    for _ in range(30):
        cost.add(8, (4, 4, 4), 1, seconds(CPU, 8, (4, 4, 4)))
    for nodes, shape in zip((1, 4, 8, 64), SHAPES, strict=True):
        assert cost.seconds(nodes, shape) == pytest.approx(seconds(CPU, nodes, shape), rel=0.01)


def test_several_kinds_tell_what_is_dear():
    """Nodes cost three times what the look-up says, levels a third."""
    true = UsualCosts([(rows, 3.0 * added) for rows, added in CPU.rows], (CPU.level[0] / 3, CPU.level[1] / 3))
    noise, cost = random.Random(0), RoundCost(CPU)
    for _ in range(40):
        for nodes, shape in ((1, ()), (8, (4, 4, 4)), (4, (4,))):
            cost.add(nodes, shape, 1, seconds(true, nodes, shape) * noise.uniform(0.9, 1.1))
    for nodes, shape in ((1, ()), (8, (4, 4, 4)), (32, (4, 8, 8, 8))):
        assert cost.seconds(nodes, shape) == pytest.approx(seconds(true, nodes, shape), rel=0.2)


def test_a_hiccup_counts_little_and_a_longer_context_is_followed():
    cost = RoundCost(GPU)
    for _ in range(30):
        cost.add(64, SHAPES[3], 1, 0.01)
    cost.add(64, SHAPES[3], 1, 100.0)
    assert cost.seconds(64, SHAPES[3]) < 0.012
    for _ in range(150):
        cost.add(64, SHAPES[3], 1, 0.02)
    assert cost.seconds(64, SHAPES[3]) == pytest.approx(0.02, rel=0.02)


def test_what_is_known_from_before_yields_soon():
    before = RoundCost(CPU)
    for _ in range(100):
        before.add(8, (4, 4, 4), 1, 0.05)
    cost = RoundCost(CPU, before.times)
    assert cost.seconds(8, (4, 4, 4)) == pytest.approx(0.05)
    for _ in range(20):
        cost.add(8, (4, 4, 4), 1, 0.1)
    assert cost.seconds(8, (4, 4, 4)) > 0.08
    assert before.seconds(8, (4, 4, 4)) == pytest.approx(0.05), "its own times are left alone"


def test_costs_of_rounds_are_forgotten_after_some_calls(monkeypatch):
    """Until a call has found them anew; one that found nothing out changes nothing."""
    monkeypatch.setattr("longspec_hf.round_cost.CALLS_A_COST", 2)

    class Model:
        pass

    models = Model(), Model()
    times = PairTimes(*models)
    assert times.recall_costs("a kind") == {}
    for cost in (1.5, 2.5):
        times.remember_costs("a kind", {"tree": cost})
        times.remember_costs("a kind", {})
        assert [times.recall_costs("a kind") for _ in range(4)] == [{"tree": cost}, {"tree": cost}, {}, {}]
    assert times.recall_costs("another kind") == {} == PairTimes(Model(), models[1]).recall_costs("a kind")
