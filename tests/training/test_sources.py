"""What the command line of training refuses before anything is trained: token files, held-out texts, options."""

import json

import numpy as np
import pytest
import torch

from longspec_hf.training import count_tokens, most_frequent_tokens
from longspec_hf.training.run import ScriptArguments, check_arguments, load_rows, load_tau_texts
from longspec_hf.training.token_files import TokenFile, parse_token_file


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("own.npy", ("own.npy", 0, 1)),
        ("own.npy*4", ("own.npy", 0, 4)),
        ("own.npy@1024*4", ("own.npy", 1024, 4)),
        ("me@home/a*b/own.npy", ("me@home/a*b/own.npy", 0, 1)),
        ("me@home/a*2b/own@3.npy@12", ("me@home/a*2b/own@3.npy", 12, 1)),
        ("own.npy*x", ("own.npy*x", 0, 1)),
    ],
)
def test_numbers_at_the_end_of_a_name_are_no_part_of_the_path(name, expected):
    assert parse_token_file(name) == TokenFile(*expected)


def test_paths_with_signs_are_read(tmp_path):
    folder = tmp_path / "a@b*c"
    folder.mkdir()
    np.save(folder / "own.npy", np.array([[5, 6, 7, 8]]))
    rows = load_rows(ScriptArguments(tokens=[f"{folder}/own.npy@2*3"]), None, 4, 64)
    assert len(rows) == 3
    assert rows[2]["labels"].tolist() == [-100, -100, 7, 8]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([5, 499, 7, 8]), r"expected ids below the target's vocabulary size of 64, got 499"),
        (np.array([[5, 6], [7, -3]]), r"expected ids from 0 on, got -3"),
        (
            np.ones((2, 3, 4), int),
            r"expected integers `\[tokens\]` or `\[rows, tokens\]`, got int64 of shape \[2, 3, 4",
        ),
        (np.ones((2, 4)), r"expected integers .*, got float64 of shape \[2, 4\]"),
        (np.zeros((0, 4), int), r"expected at least one row of 2 tokens, got the shape \[0, 4\]"),
    ],
)
def test_arrays_that_are_not_the_targets_tokens_are_refused(tmp_path, tokens, message):
    np.save(tmp_path / "own.npy", tokens)
    with pytest.raises(ValueError, match=r"`tokens` names .*own\.npy, " + message):
        load_rows(ScriptArguments(tokens=[f"{tmp_path}/own.npy"]), None, 2, 64)


def test_files_that_hold_no_array_are_refused(tmp_path):
    np.savez(tmp_path / "own.npz", a=np.arange(9))
    (tmp_path / "own.txt").write_text("words")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "own.npy", np.arange(9))
    for name, message in {
        "own.npz": r"expected one array \(`.npy`\), got an archive",
        "own.txt": r"expected a `.npy` file, got another",
        "empty.npy": r"expected a `.npy` file, got another",
        "none.npy*2": r"expected a `.npy` file, got none there",
        "own.npy*-1": r"names .*own.npy\*-1, expected a `.npy` file, got none there",
        "own.npy*0": r"takes .*own.npy 0 times",
    }.items():
        with pytest.raises(ValueError, match=r"`tokens` .*" + message):
            load_rows(ScriptArguments(tokens=[f"{tmp_path}/{name}"]), None, 4, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_dtype": "bf16"}, "`target_dtype` must be one of bfloat16, float16, float32, float64, got 'bf16'"),
        ({"target_dtype": "auto"}, "`target_dtype` must be one of"),
        ({"length": 1}, "`length` must be at least 2"),
        ({"length": 0}, "`length` must be at least 2"),
        ({"length": -5}, "`length` must be at least 2"),
        ({"draft": "d", "draft_vocab_size": 16}, "`draft_vocab_size` is 16, expected none beside `draft`"),
        ({"draft": "d", "intermediate_size": 8}, "`intermediate_size` is 8, expected none beside `draft`"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(ScriptArguments(**arguments))
    check_arguments(ScriptArguments(draft="d", target_layer_idx=1))
    check_arguments(ScriptArguments(draft_vocab_size=16, length=2))


def test_held_out_texts_without_output_are_refused(tmp_path):
    good = {"prompt_ids": [7, 8], "output_ids": [9]}
    path = tmp_path / "texts.jsonl"
    for changed, message in [
        ({"output_ids": []}, r"text 2 must have tokens in .* got 2 and 0. Run `evaluate_tau.py generate`"),
        ({"prompt_ids": []}, r"text 2 must have tokens in .* got 0 and 1"),
        ({"output_ids": [64]}, r"text 2 has ids from 7 to 64, expected 0 to 63"),
    ]:
        path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **changed}) + "\n")
        with pytest.raises(ValueError, match=r"`tau_texts` \(.*texts.jsonl\): " + message):
            load_tau_texts(str(path), 64)
    path.write_text(json.dumps(good) + "\n")
    assert len(load_tau_texts(str(path), 64)) == 1
    path.write_text("")
    with pytest.raises(ValueError, match=r"`tau_texts` \(.*texts.jsonl\) is empty"):
        load_tau_texts(str(path), 64)


def test_counts_refuse_tokens_outside_the_vocabulary():
    assert count_tokens([[1, 1, 3], []], 4).tolist() == [0, 2, 0, 1]
    for row in ([2, 4], [-1]):
        with pytest.raises(ValueError, match="`rows` hold ids from"):
            count_tokens([row], 4)
    with pytest.raises(ValueError, match="`always` names tokens from 9 to 9, expected 0 to 3"):
        most_frequent_tokens(torch.ones(4), 2, [9])
