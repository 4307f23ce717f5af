"""Loading a pair, and prompts as token ids."""

import pytest
import torch
from models import tiny_target
from saved_pairs import save_tiny_pair, word_tokenizer

from longspec_hf import pairs
from longspec_hf.pairs import Pair, encode_prompts, load_pair, shipped_draft_folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_draft_gets_the_targets_dtype(saved, dtype):
    pair = load_pair(*saved, dtype=dtype, device="cpu")
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert pair.target.dtype == pair.draft.dtype == expected
    assert pair.draft.draft_token_ids.dtype == torch.int64
    assert not pair.target.training and not pair.draft.training
    assert pair.context == 8192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int3"}, "`dtype` must be one of auto, float32"),
        ({"device": "cuda:77"}, r"`device` must name a device of this machine, got 'cuda:77'"),
        ({"device": "abacus"}, "`device` must name a device of this machine, got 'abacus'"),
        ({"target": "/no/such/folder", "draft": None}, "`draft` must name the draft made for `target`"),
        ({"draft": "/no/such/folder"}, "`draft` must be a Hub id or a folder of a model, got '/no/such/folder'"),
        ({"target": "/no/such/folder"}, "`target` must be a Hub id or a folder of a model, got '/no/such/folder'"),
    ],
)
def test_what_cannot_be_loaded_is_named(saved, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_pair(**{"target": saved[0], "draft": saved[1], **arguments})


def test_a_target_is_no_draft(saved):
    with pytest.raises(ValueError, match=r"`draft` must be .* must hold a LongSpec draft"):
        load_pair(saved[0], saved[0])


def test_a_failed_fetch_is_an_error_of_the_environment(monkeypatch):
    def fail():
        raise RuntimeError("pip could not fetch it: no such host")

    monkeypatch.setattr(pairs, "embedded_target_folder", fail)
    with pytest.raises(OSError, match="no such host"):
        load_pair()


def test_the_shipped_draft_is_there(monkeypatch, tmp_path):
    assert (shipped_draft_folder() / "config.json").exists()
    monkeypatch.setattr(pairs, "__file__", str(tmp_path / "longspec_hf" / "pairs.py"))
    with pytest.raises(ValueError, match="there is no shipped draft"):
        shipped_draft_folder()


def word_pair(chat=True):
    return Pair(tiny_target(), word_tokenizer(chat), None)


def test_prompts_are_padded_on_the_left():
    inputs = encode_prompts(word_pair(), ["w7", "w8 w9"], chat=False)
    assert inputs["input_ids"].tolist() == [[1, 7], [8, 9]]
    assert inputs["attention_mask"].tolist() == [[0, 1], [1, 1]]


def test_the_chat_template_is_used_where_there_is_one():
    pair = word_pair()
    assert pair.tokenizer.decode(encode_prompts(pair, ["w7"])["input_ids"][0]) == "user w7 assistant"
    with_system = encode_prompts(pair, ["w7"], system="w9")
    assert pair.tokenizer.decode(with_system["input_ids"][0]) == "system w9 user w7 assistant"
    assert encode_prompts(word_pair(chat=False), ["w7"])["input_ids"].tolist() == [[7]]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "`prompts` must be texts that are not empty"),
        (["w7", " \n"], {}, "`prompts` must be texts that are not empty"),
        (["w7"], {"chat": True}, "`chat` needs a tokenizer with a chat template"),
        (["w7"], {"system": "w8"}, "`system` needs a chat template"),
    ],
)
def test_prompts_that_are_none(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts(word_pair(chat=False), prompts, **options)
