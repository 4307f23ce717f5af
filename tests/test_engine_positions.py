"""Positions and their rotary rows: from the table what transformers' module gives, and when it is made anew."""

import pytest
import torch
from engine_calls import after_prefill, call
from models import learned, prompt, tiny_target
from transformers import GenerationConfig

from longspec_hf.engine import Engine, positions
from longspec_hf.engine.positions import RotaryTable
from longspec_hf.settings import resolve_tree_settings
from longspec_hf.target import bind

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def table_of(dtype=torch.float32, **options):
    model = tiny_target(dtype=dtype, **options)
    bound = bind(learned(model), model)
    return RotaryTable(bound, torch.empty(0, dtype=dtype)), bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"rope_parameters": LLAMA3}], ids=["plain", "llama3"])
@pytest.mark.parametrize("most", [positions.MOST_ROWS, 10], ids=["table", "anew"])
def test_rows_are_the_modules_bit_for_bit(dtype, options, most, monkeypatch):
    """Rows of a long table, and those of calls too long for one; those behind a limit are the last allowed one's."""
    monkeypatch.setattr(positions, "MOST_ROWS", most)
    table, bound = table_of(dtype, **options)
    table.cover(100, 900)
    roots, limits = torch.tensor([[100], [896], [500]]), torch.tensor([[50], [3], [-1]])
    cos, sin, ids = table.rows(roots, limits, 6)
    assert ids.tolist() == [list(range(first, first + 6)) for first in (100, 896, 500)]
    for row, first in enumerate((100, 896, 500)):
        for step in range(6):
            at = min(first + step, first + max(0, int(limits[row])))
            expected = bound.position_embeddings(torch.tensor([[at]]), torch.empty(0, dtype=dtype))
            assert torch.equal(cos[row, step], expected[0][0, 0]) and torch.equal(sin[row, step], expected[1][0, 0])
    assert cos.dtype == dtype and cos.shape == (3, 6, expected[0].shape[-1])


def test_the_table_moves_only_for_positions_it_lacks(monkeypatch):
    table, _ = table_of()
    assert table.cover(10, 30)
    assert not table.cover(10, 30) and not table.cover(12, 25)
    assert table.cover(9, 30)
    assert table.cover(9, 31)
    monkeypatch.setattr(positions, "MOST_ROWS", 20)
    assert table.cover(9, 60)  # captured graphs read a table that is gone
    assert not table.cover(9, 61)  # they compute the rows now
    assert table.cover(50, 60)


@pytest.mark.usefixtures("engine_on_cpu")
@pytest.mark.parametrize("sample", [False, True])
def test_calls_too_long_for_a_table_write_the_same(monkeypatch, sample):
    model = tiny_target(initializer_range=0.1)
    ids, draft = prompt(20, seed=1), learned(model)
    texts = []
    for most in (positions.MOST_ROWS, 5):
        monkeypatch.setattr(positions, "MOST_ROWS", most)
        torch.manual_seed(0)
        out = call(model, ids, draft, do_sample=sample)
        assert out.speculation_stats.rounds > 3
        texts.append(out.sequences)
    assert torch.equal(*texts)


@pytest.mark.usefixtures("engine_on_cpu")
def test_captured_rounds_are_forgotten_when_their_table_moves():
    model = tiny_target(initializer_range=0.1)
    draft = learned(model)
    settings = resolve_tree_settings(draft, GenerationConfig()).of_tree(None)
    generator, cache = after_prefill(model, draft, prompt(20, seed=1), settings)
    generator.append([[5]])
    engine = Engine(model, generator, cache)
    for limit, kept in ((30, True), (25, True), (60, False)):
        engine.load([30], None)
        engine.prepare(settings, greedy=True)
        assert engine._graphs
        engine.load([limit], None)
        assert bool(engine._graphs) == kept
