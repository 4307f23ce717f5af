"""`longspec-hf bench` where there is no GPU: what it refuses, the prompts, and what becomes of figures."""

import argparse
import csv
import json

import pytest
import torch
from models import tiny_target
from saved_pairs import save_tiny_pair

from longspec_hf.bench import run as bench
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


def test_prompts_of_held_out_texts_are_their_ends(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"prompt_ids": list(range(n))}) + "\n" for n in (3, 8, 9, 10, 11)))
    args = options("--target", "embedded", "--texts", str(path), "--prompts", "2")
    assert [ids.tolist() for ids in bench.prompts(args, tiny_target(), 4, 1)] == [[[4, 5, 6, 7]], [[6, 7, 8, 9]]]


def test_prompts_of_a_target_are_parts_of_its_text(tmp_path):
    folder, _ = save_tiny_pair(tmp_path)
    target = tiny_target()
    target.config.name_or_path = str(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{token}" for token in range(5, 25)))
    args = options("--target", str(folder), "--texts", str(text))
    assert [ids.tolist() for ids in bench.prompts(args, target, 20, 1)] == [[list(range(5, 25))]]
    both = [list(range(5, 21)), list(range(9, 25))]
    assert [ids.tolist() for ids in bench.prompts(args, target, 16, 2)] == [both]
    args.prompts = 2
    assert [ids.tolist() for ids in bench.prompts(args, target, 16, 1)] == [both[:1], both[1:]]
    with pytest.raises(ValueError, match="`texts` must hold 2 prompts of 20 tokens, got 1"):
        bench.prompts(args, target, 20, 1)
    with pytest.raises(ValueError, match="`texts` must name a file"):
        bench.prompts(options("--target", str(folder)), target, 4, 1)


def test_calls_become_rows(monkeypatch):
    """Texts are compared with the first way's, as far as both go; ratios stay within a context."""
    texts = {PLAIN: [[1, 2, 3, 4], [5, 6, 7, 8]], LONGSPEC: [[1, 2, 3, 4, 9], [5, 6, 0, 8, 9]]}

    def decode(way, target, draft, ids, tokens, warm_up, **sampling):
        assert warm_up and sampling == {"do_sample": True, "temperature": 0.5, "top_k": 0}
        assert tokens == {PLAIN: 4, LONGSPEC: 5}[way]
        sequences = torch.cat([ids, torch.tensor(texts[way])], dim=1)
        ms = {PLAIN: 8.0, LONGSPEC: 2.0}[way] * ids.shape[1] / 10
        return Decoded(way, 40.0, ms, 0.5, None if way == PLAIN else 3.456, 7, sequences, 2**30)

    monkeypatch.setattr(bench, "decode", decode)
    sizes = [
        "--contexts",
        "10",
        "20",
        "--batch",
        "2",
        "--new-tokens",
        "5",
        "--slow-tokens",
        "4",
        "--temperature",
        "0.5",
    ]
    rows = bench.measure_calls(
        options("--shape", "llama-3-8b", *sizes, "--ways", PLAIN, LONGSPEC), tiny_target(), None
    )
    assert [(row["context"], row["way"]) for row in rows] == [(n, way) for n in (10, 20) for way in (PLAIN, LONGSPEC)]
    assert rows[3] == {
        "context": 20,
        "batch": 2,
        "temperature": 0.5,
        "way": LONGSPEC,
        "token_ms": 4.0,
        "tokens_per_second": 500.0,
        "prefill_ms": 40.0,
        "warm_up_s": 0.5,
        "tau": 3.46,
        "plain_steps": 7,
        "peak_gib": 1.0,
        "equal_tokens": 6,
        "of_tokens": 8,
        "over_default": 4.0,
        "over_compiled": None,
        "over_captured_plain": None,
    }
    assert rows[2]["equal_tokens"] == 8 and rows[2]["tau"] is None


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
    pytest.importorskip("matplotlib", reason="matplotlib, which no extra asks for, is not installed")
    from matplotlib import pyplot

    path = tmp_path / "calls.png"
    rows = [
        row(way, ms * n, n, batch) for n in (100, 200) for batch in (1, 4) for way, ms in ((PLAIN, 2), (LONGSPEC, 1))
    ]
    bench.plot(rows, FACTS, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    lines = {line.get_label(): line for line in pyplot.gcf().axes[0].get_lines()}
    assert list(lines) == [PLAIN, LONGSPEC]
    assert lines[PLAIN].get_xydata().tolist() == [[100, 5.0], [200, 2.5]]
    assert pyplot.gcf().axes[0].get_title() == "tiny, batch 1, a device"
