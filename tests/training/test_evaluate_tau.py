"""`examples/evaluate_tau.py`: texts are written as they come, and `measure --real` compares like with like."""

import json
import re

import pytest
from example_scripts import example
from saved_pairs import save_tiny_pair
from transformers import LlamaForCausalLM

from longspec_hf.training.heldout import load_texts, package_sources, save_texts
from longspec_hf.training.tau import TauInput

LENGTHS = (30, 12, 21)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return [str(path) for path in save_tiny_pair(tmp_path_factory.mktemp("pair"))]


@pytest.fixture
def generate(pair, tmp_path):
    """Makes texts of prompts that are not in the order of their lengths."""
    prompts = [TauInput([5 + i * i % 50 for i in range(n)], [], f"p{n}", "completion") for n in LENGTHS]
    save_texts(tmp_path / "prompts.jsonl", prompts)
    arguments = ["generate", "--target", pair[0], "--prompts", str(tmp_path / "prompts.jsonl"), "--new-tokens", "20"]

    def run(*options):
        example("evaluate_tau").main([*arguments, "--output", str(tmp_path / "texts.jsonl"), *options])
        return load_texts(tmp_path / "texts.jsonl")

    return run


def test_texts_are_in_the_prompts_order(generate, tmp_path):
    texts = generate("--temperature", "1.0")
    assert [text.name for text in texts] == ["p30", "p12", "p21"] * 2
    # Seeds follow the order of generating, by length.
    decodings = ["greedy"] * 3 + ["T=1.0 seed=3", "T=1.0 seed=1", "T=1.0 seed=2"]
    assert [text.decoding for text in texts] == decodings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "texts.jsonl"]


def test_an_interruption_keeps_what_is_done(generate, tmp_path, monkeypatch):
    plain, calls = LlamaForCausalLM.generate, []

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate()
    assert [text.name for text in load_texts(tmp_path / "texts.jsonl")] == ["p12", "p21", "p30", "p12"]


@pytest.mark.parametrize("order", [["greedy", "sampled"], ["sampled", "greedy"]])
def test_real_rounds_are_compared_with_the_same_text(generate, pair, tmp_path, capsys, order):
    # Two prompts of one name, too: rows are told apart by their place.
    generate("--decoding", *order, "--temperature", "1.0")
    texts = load_texts(tmp_path / "texts.jsonl")
    same_names = [TauInput(**{**vars(text), "name": "same"}) for text in texts]
    save_texts(tmp_path / "texts.jsonl", same_names)
    capsys.readouterr()
    arguments = ["measure", "--target", pair[0], "--draft", pair[1], "--texts", str(tmp_path / "texts.jsonl")]
    example("evaluate_tau").main([*arguments, "--trees", "beam_ngram", "lookup", "--real"])
    found = re.findall(r"same: generate (\d+) rounds, replay (\d+), same text: True", capsys.readouterr().out)
    assert len(found) == 3 and all(real == replayed for real, replayed in found)


def test_what_cannot_be_measured_or_made(generate, pair, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"`temperature` must be above 0, got 0\.0"):
        generate("--temperature", "0")
    for command, option, value in (("measure", "--trees", "bogus"), ("generate", "--batch-size", "0")):
        files = {"measure": ["--texts", "x", "--draft", "y"], "generate": ["--prompts", "x", "--output", "y"]}
        with pytest.raises(SystemExit):
            example("evaluate_tau").main([command, *files[command], option, value])
        assert f"argument {option}: " in capsys.readouterr().err
    (tmp_path / "prompts.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"`prompts` \(.*prompts.jsonl\) is empty"):
        generate()
    assert not (tmp_path / "texts.jsonl").exists()


def test_other_lines_are_no_texts(tmp_path):
    text = {"prompt_ids": [5], "output_ids": [6]}
    (tmp_path / "x.jsonl").write_text(json.dumps(text) + "\n\n" + json.dumps({"text": "w7"}) + "\n")
    with pytest.raises(ValueError, match=r"line 3 of .*x.jsonl must be a held-out text .*got the fields \['text'\]"):
        load_texts(tmp_path / "x.jsonl")


def test_a_part_of_no_package_is_named():
    with pytest.raises(ValueError, match=r"`packages` names 'nowhere.part', which is not an installed package"):
        package_sources(["nowhere.part"])
