"""`longspec-hf bench` where there is no GPU: what it refuses, the prompts, and what becomes of figures."""

import argparse
import csv
import json
from types import SimpleNamespace

import pytest
import torch
from models import learned, tiny_target
from saved_pairs import save_tiny_pair

from longspec_hf.bench import run as bench
from longspec_hf.bench import ways
from longspec_hf.bench.rounds import RoundTimes
from longspec_hf.bench.ways import CAPTURED_PLAIN, COMPILED, LONGSPEC, PLAIN, Decoded
from longspec_hf.cli import main

MODEL_AND_SHAPE = ["--target", "embedded", "--shape", "llama-3-8b"]
FACTS = {"model": "tiny", "device": "a device"}


def options(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def row(way, token_ms, context=100, batch=1, **fields):
    return {
        "context": context,
        "batch": batch,
        "way": way,
        "token_ms": token_ms,
        "tokens_per_second": 1e3 * batch / token_ms,
        **fields,
    }


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="`bench` needs an NVIDIA GPU, got none"):
        bench.run(options("--shape", "qwen2.5-7b"))
    assert main(["bench", "--shape", "qwen2.5-7b"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("longspec-hf bench: `bench` needs an NVIDIA GPU") and captured.out == ""


@pytest.mark.parametrize("arguments", [[], MODEL_AND_SHAPE])
def test_one_of_target_and_shape_must_be_given(capsys, monkeypatch, arguments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="`target` or `shape` must be given, and one of them"):
        bench.run(options(*arguments))
    assert main(["bench", *arguments]) == 2
    assert "`target` or `shape` must be given" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--shape", "gpt"], ["--shape", "llama-3-8b", "--ways", "plain"]])
def test_what_is_not_to_be_chosen_is_refused(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_no_ways_means_no_calls():
    assert options("--shape", "llama-3-8b", "--ways").ways == []
    assert options("--shape", "llama-3-8b", "--ways", PLAIN, LONGSPEC).ways == [PLAIN, LONGSPEC]


def test_prompts_of_a_shape_are_random_and_the_same_again():
    target = tiny_target()
    args = options("--shape", "qwen2.5-7b")
    (ids,) = bench.prompts(args, target, 50, 3)
    assert ids.shape == (3, 50) and len({tuple(line) for line in ids.tolist()}) == 3
    assert torch.equal(ids, bench.prompts(args, target, 50, 3)[0])


@pytest.fixture
def prompts_of(tmp_path):
    """Prompts that a tiny target gets from a file."""
    folder, _ = save_tiny_pair(tmp_path)
    target = tiny_target()
    target.config.name_or_path = str(folder)

    def read(path, context, sequences, count=1):
        args = options("--target", str(folder), "--texts", str(path), "--prompts", str(count))
        return [ids.tolist() for ids in bench.prompts(args, target, context, sequences)]

    return read


def test_prompts_of_a_text_are_stretches_of_it(tmp_path, prompts_of):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{token}" for token in range(5, 25)))
    stretches = [list(range(first, first + 16)) for first in (5, 6, 7, 8)]
    assert prompts_of(path, 20, 1) == [[list(range(5, 25))]]
    assert prompts_of(path, 16, 1, count=4) == [[ids] for ids in stretches]
    assert prompts_of(path, 16, 2, count=2) == [stretches[:2], stretches[2:]]
    with pytest.raises(ValueError, match=r"`texts` must hold 6 prompts of 16 tokens, got 5 in .*text\.txt"):
        prompts_of(path, 16, 3, count=2)


def test_prompts_of_held_out_texts_are_their_last_tokens(tmp_path, prompts_of):
    path = tmp_path / "texts.jsonl"
    texts = [list(range(first, first + length)) for first, length in ((5, 10), (20, 4), (30, 12), (40, 11))]
    path.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in texts))
    long = [texts[0], texts[2][-10:], texts[3][-10:]]
    assert prompts_of(path, 10, 1, count=3) == [[ids] for ids in long]
    assert prompts_of(path, 10, 1) == [[long[0]]]
    assert prompts_of(path, 4, 1, count=2) == [[texts[0][-4:]], [texts[2][-4:]]]  # spread over the file
    with pytest.raises(ValueError, match="`texts` must hold 4 prompts of 10 tokens, got 3"):
        prompts_of(path, 10, 2, count=2)


def test_a_target_needs_a_text():
    with pytest.raises(ValueError, match="`texts` must name a file"):
        bench.prompts(options("--target", "org/target"), tiny_target(), 4, 1)


def decoded(way, token_ms, texts, context=2, **fields):
    sequences = torch.cat([torch.full((len(texts), context), 63), torch.tensor(texts)], dim=1)
    facts = {"prefill_ms": 40.0, "warm_up_s": 0.5, "tau": None, "plain_steps": 0, "peak_bytes": 2**30}
    return Decoded(way, token_ms=token_ms, sequences=sequences, **{**facts, **fields})


def test_calls_are_described_by_means_and_compared_with_the_first_way():
    references = {}
    plain = [decoded(PLAIN, 8.0, [[1, 2, 3], [4, 5, 6]]), decoded(PLAIN, 4.0, [[1, 1, 1], [2, 2, 2]])]
    assert bench.describe(plain, 2, 2, references) == {
        "token_ms": 6.0,
        "tokens_per_second": 333.3,
        "prefill_ms": 40.0,
        "warm_up_s": 0.5,
        "tau": None,
        "plain_steps": 0,
        "peak_gib": 1.0,
        "equal_tokens": 12,
        "of_tokens": 12,
    }
    texts = [[1, 2, 3, 9], [4, 0, 6, 9]], [[1, 1, 0, 9], [2, 2, 2, 9]]  # longer; what follows a difference is no match
    facts = {"plain_steps": 3, "peak_bytes": 3 * 2**30, "warm_up_s": 0.0}
    drafted = [decoded(LONGSPEC, 1.0, texts[0], tau=3.0), decoded(LONGSPEC, 3.0, texts[1], tau=4.5, **facts)]
    found = bench.describe(drafted, 2, 2, references)
    assert (found["token_ms"], found["tokens_per_second"], found["tau"]) == (2.0, 1000.0, 3.75)
    assert (found["plain_steps"], found["peak_gib"], found["warm_up_s"]) == (3, 3.0, 0.5)
    assert (found["equal_tokens"], found["of_tokens"]) == (3 + 1 + 2 + 3, 12)


def test_every_way_is_called_at_every_context(monkeypatch):
    """transformers' own ways write fewer tokens, and ratios stay within a context."""
    calls = []

    def decode(way, target, draft, ids, tokens, **options):
        calls.append((way, ids.shape[1], tokens, options))
        return decoded(way, {PLAIN: 8.0, LONGSPEC: 2.0}[way] * ids.shape[1], [[1] * tokens], ids.shape[1])

    monkeypatch.setattr(bench, "decode", decode)
    sizes = ["--contexts", "10", "20", "--new-tokens", "5", "--slow-tokens", "4", "--temperature", "0.8"]
    args = options("--shape", "llama-3-8b", *sizes, "--ways", PLAIN, LONGSPEC)
    rows = bench.measure_calls(args, tiny_target(), None)
    sampled = {"warm_up": True, "repeats": 3, "do_sample": True, "temperature": 0.8, "top_k": 0}
    assert calls == [(way, n, k, sampled) for n in (10, 20) for way, k in ((PLAIN, 4), (LONGSPEC, 5))]
    assert [(row["context"], row["batch"], row["way"], row["temperature"]) for row in rows] == [
        (n, 1, way, 0.8) for n in (10, 20) for way in (PLAIN, LONGSPEC)
    ]
    assert [row["over_default"] for row in rows] == [1.0, 4.0, 1.0, 4.0]
    assert {row["over_compiled"] for row in rows} == {row["over_captured_plain"] for row in rows} == {None}


def test_a_round_s_floor_is_of_the_copy_rate_beside_it(monkeypatch):
    target = tiny_target()
    rates, timed = iter([3e12, 2e12, 3e12, 1e12]), []

    def time_rounds(target, draft, settings, context, rate, sequences, with_parts):
        timed.append((context, bool(settings.depth), rate, with_parts))
        parts = {"walk": 0.5, "of it beam": 0.25} if with_parts else {}
        return RoundTimes(context, settings.max_nodes, settings.depth, 9.0, 6e12 / rate, 2.0, parts)

    monkeypatch.setattr(bench, "copy_rate", lambda device: next(rates))
    monkeypatch.setattr(bench, "time_rounds", time_rounds)
    args = options("--shape", "qwen2.5-7b", "--contexts", "10", "20")
    rows = bench.measure_rounds(args, target, learned(target))
    assert timed == [
        (10, True, 3e12, True),
        (10, False, 2e12, False),
        (20, True, 3e12, True),
        (20, False, 1e12, False),
    ]
    assert [row["copy_tb_s"] for row in rows] == [3.0, 2.0, 3.0, 1.0]
    assert [row["times_floor"] for row in rows] == [4.5, 3.0, 4.5, 1.5]
    assert rows[0]["walk_ms"] == 0.5 and rows[0]["of_it_beam_ms"] == 0.25 and "walk_ms" not in rows[1]


def test_times_are_medians_so_that_one_pause_does_not_count(monkeypatch):
    taken = iter([9.0, 2.0, 2.9, 2.1, 1.0, 1.5, 1.1])
    output = SimpleNamespace(sequences=torch.zeros(1, 14), speculation_stats=None)
    monkeypatch.setattr(ways, "_seconds", lambda function: (next(taken), output))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    found = ways.decode(PLAIN, None, None, torch.zeros(1, 3, dtype=torch.long), 11, repeats=3)
    assert (found.token_ms, found.prefill_ms, found.warm_up_s) == pytest.approx((100.0, 1100.0, 6.9))
    assert next(taken, None) is None


def test_ratios_are_to_the_plain_ways():
    rows = [row(PLAIN, 20.0), row(COMPILED, 10.0), row(CAPTURED_PLAIN, 8.0), row(LONGSPEC, 4.0)]
    bench.add_ratios(rows)
    assert [row["over_default"] for row in rows] == [1.0, 2.0, 2.5, 5.0]
    assert [row["over_compiled"] for row in rows] == [0.5, 1.0, 1.25, 2.5]
    assert [row["over_captured_plain"] for row in rows] == [0.4, 0.8, 1.0, 2.0]


def test_a_csv_has_the_columns_of_all_rows(tmp_path):
    path = tmp_path / "new" / "calls.csv"
    bench.write_csv([row(PLAIN, 20.0, tau=None), row(LONGSPEC, 4.0, tau=3.5, more="x, y")], path)
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == ["context", "batch", "way", "token_ms", "tokens_per_second", "tau", "more"]
    assert (first["way"], first["tau"], first["more"]) == (PLAIN, "", "")
    assert (second["tokens_per_second"], second["tau"], second["more"]) == ("250.0", "3.5", "x, y")


def test_a_table_is_aligned(capsys):
    bench.print_table([{"way": "a", "tau": None}, {"way": "longer", "tau": 3.5, "more": 1}])
    assert capsys.readouterr().out.splitlines() == ["   way  tau  more", "     a           ", "longer  3.5     1"]


def test_a_plot_shows_the_smallest_batch(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `dev` is not installed")
    from matplotlib import pyplot

    path = tmp_path / "calls.png"
    rows = [
        row(way, ms * n, n, batch) for n in (100, 200) for batch in (1, 4) for way, ms in ((PLAIN, 2), (LONGSPEC, 1))
    ]
    bench.plot(rows, FACTS, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    for axes, expected in zip(pyplot.gcf().axes, ([5.0, 10.0], [2.5, 5.0]), strict=True):
        assert [bar.get_width() for bar in axes.patches] == expected
    assert [label.get_text() for label in pyplot.gcf().axes[0].get_yticklabels()] == [PLAIN, LONGSPEC]
    assert pyplot.gcf().get_suptitle() == "tiny, batch 1, a device"


def test_garbage_is_collected_before_a_call_is_timed(monkeypatch):
    """Not while it runs: after compiling, a full collection takes most of a second."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("clock")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 2500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(ways.gc, "collect", lambda: order.append("collected"))
    assert ways._seconds(lambda: order.append("called") or "result") == (2.5, "result")
    assert order == ["collected", "clock", "called", "clock"]
