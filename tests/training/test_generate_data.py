"""`examples/generate_data.py`: texts to tokens, and what is refused."""

import json

import numpy as np
import pytest
from example_scripts import example
from saved_pairs import save_tiny_pair


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return str(save_tiny_pair(tmp_path_factory.mktemp("pair"))[0])


@pytest.fixture
def tokenized(target, tmp_path):
    """The tokens that `tokenize` makes of paths and options."""

    def run(*arguments):
        output = tmp_path / "made" / "tokens.npy"
        example("generate_data").main(["tokenize", "--target", target, "--output", str(output), "--paths", *arguments])
        return np.load(output).tolist()

    return run


def test_lines_with_messages(tokenized, tmp_path):
    messages = [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w9"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps({"text": "w10"}) + "\n")
    # user w7 w8 assistant w9 and the template's own end
    assert tokenized(str(tmp_path / "x.jsonl")) == [3, 7, 8, 4, 9, 4, 1, 10, 1]


def test_only_names_below_the_given_folder_are_excluded(tokenized, tmp_path):
    root = tmp_path / "pandas-work" / "docs"
    (root / "pandas-2.0").mkdir(parents=True)
    (root / "a.txt").write_text("w7 w8")
    (root / "latin.txt").write_bytes(b"\xe9")
    (root / "pandas-2.0" / "b.txt").write_text("w9")
    assert tokenized(str(root), "--exclude", "pandas") == [7, 8, 1]
    assert sorted(tokenized(str(root))) == [1, 1, 7, 8, 9]


def test_no_tokens_are_refused(tokenized, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.jsonl").write_text('{"text": "w7"}')
    with pytest.raises(ValueError, match=r"`paths` \(.*texts\) gave 0 tokens"):
        tokenized(str(tmp_path / "texts"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("script", ["generate_data", "evaluate_tau", "finetune_lora"])
def test_a_dtype_of_another_name_is_refused(script, tmp_path):
    arguments = {
        "generate_data": ["continue", "--tokens", "x.npy", "--output", "y.npy"],
        "evaluate_tau": ["generate", "--prompts", "x.jsonl", "--output", "y.jsonl"],
        "finetune_lora": ["--draft", "x", "--texts", "y", "--output", "z"],
    }
    with pytest.raises(ValueError, match=r"`dtype` must be one of float32, bfloat16, float16, float64, got 'bf16'"):
        example(script).main([*arguments[script], "--target", str(tmp_path), "--dtype", "bf16"])


@pytest.mark.parametrize("option", ["--batch-size", "--count", "--new-tokens", "--prompt-length"])
def test_numbers_below_one_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        example("generate_data").main(["continue", "--tokens", "x", "--output", "y", option, "0"])
    assert f"{option}: expected an integer of at least 1, got '0'" in capsys.readouterr().err


def test_a_negative_temperature_is_refused():
    with pytest.raises(ValueError, match=r"`temperatures` must not be negative, got -1\.0"):
        example("generate_data").main(["continue", "--tokens", "x", "--output", "y", "--temperatures", "0", "-1"])
