"""Rows from files, datasets and the target itself; the draft vocabulary."""

import json

import numpy as np
import pytest
import torch
from models import tiny_target
from runs import small_draft
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longspec_hf.training import (
    FilledRows,
    ListedRows,
    PackedRows,
    continue_prompts,
    count_tokens,
    load_token_rows,
    make_prompts,
    most_frequent_tokens,
    pack_texts,
    read_texts,
    rows_from_dataset,
    save_tokens,
    set_draft_vocabulary,
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character; `|` is the end."""
    characters = {c: i for i, c in enumerate("|abcdefghijklmnopqrstuvwxyz \n\u241e.,?'`ESWTRy:")}
    tokenizer = Tokenizer(models.WordLevel({**characters, "?": len(characters)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="|", unk_token="?")


def test_texts_of_files_folders_and_lines(tmp_path, tokenizer):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.py").write_text("abc")
    (tmp_path / "folder" / "b.bin").write_text("no text file")
    (tmp_path / "folder" / "c.md").write_bytes(b"\xff\xfe\xff")
    lines = [{"text": "x"}, {"messages": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% endfor %}"
    assert list(read_texts([tmp_path / "folder", tmp_path / "chat.jsonl"], tokenizer)) == ["abc", "x", "user:hi"]


def test_missing_and_wrong_sources_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"`paths` names .*nowhere, which does not exist"):
        list(read_texts([tmp_path / "nowhere"]))
    (tmp_path / "x.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(
        ValueError, match=r"line 1 of .*x.jsonl must have `text` or `messages`, got the fields \['body'\]"
    ):
        list(read_texts([tmp_path / "x.jsonl"]))
    with pytest.raises(ValueError, match=r"`dataset` must have a column .*got \['body'\]"):
        rows_from_dataset([{"body": "x"}], tokenizer, 4)


def test_packing_puts_the_end_behind_every_text(tokenizer):
    tokens = pack_texts(["ab", "c"], tokenizer)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [1, 2, 0, 3, 0]
    rows = PackedRows(tokens, 2)
    assert [row["input_ids"].tolist() for row in rows] == [[1, 2], [0, 3]]
    assert pack_texts(["ab", "c"], tokenizer, batch=1, max_tokens=2).tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"`tokens` has 5 entries, fewer than one row of 6"):
        PackedRows(tokens, 6)


def test_dataset_columns(tokenizer):
    datasets = pytest.importorskip("datasets", reason="the extra `train` is not installed")
    texts = datasets.Dataset.from_dict({"text": ["ab", "cd"]})
    assert [row["input_ids"].tolist() for row in rows_from_dataset(texts, tokenizer, 3)] == [[1, 2, 0], [3, 4, 0]]
    apart = rows_from_dataset(texts, tokenizer, 3, packed=False)
    assert [apart[i]["input_ids"].tolist() for i in range(2)] == [[1, 2], [3, 4]]
    ids = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], "labels": [[-100, 6, 7, 8]]})
    row = rows_from_dataset(ids, tokenizer, 3)[0]
    assert row["input_ids"].tolist() == [5, 6, 7] and row["labels"].tolist() == [-100, 6, 7]
    assert isinstance(rows_from_dataset(ids, tokenizer, 3), ListedRows)


def test_filled_rows_learn_one_end(tmp_path):
    save_tokens(tmp_path / "own.npy", np.array([[5, 6, 2, 2, 2], [5, 6, 7, 8, 9]], dtype=np.uint16))
    rows = load_token_rows(tmp_path / "own.npy", 4)
    assert isinstance(rows, FilledRows)
    assert [row["labels"].tolist() for row in (rows[0], rows[1])] == [[5, 6, 2, -100], [5, 6, 7, 8]]
    save_tokens(tmp_path / "flat.npy", np.arange(10, dtype=np.uint16))
    assert [row["input_ids"].tolist() for row in load_token_rows(tmp_path / "flat.npy", 4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


def test_the_target_continues_prompts(tokenizer):
    target = tiny_target(eos_token_id=3)
    target.generation_config.eos_token_id = 3
    prompts = make_prompts(np.arange(1, 40), tokenizer, 5, 10, instructed=0.0, seed=1)
    assert prompts.shape == (5, 10) and (prompts.diff(dim=1) == 1).all()
    rows = continue_prompts(target, prompts, 12, batch_size=2, temperatures=(0.0, 1.0), seed=4)
    assert rows.shape == (5, 22)
    assert (rows[:, :10] == prompts.numpy()).all()
    plain = target.generate(prompts[:2], max_new_tokens=12, do_sample=False, pad_token_id=3)
    assert (rows[:2, : plain.shape[1]] == plain.numpy()).all()
    assert (rows == continue_prompts(target, prompts, 12, 2, (0.0, 1.0), 4)).all()


def test_instructed_prompts_have_the_asked_length(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}a"
    prompts = make_prompts(np.full(300, 7), tokenizer, 6, 120, instructed=1.0)
    assert prompts.shape == (6, 120)
    assert (prompts[:, -1] == 1).all()  # the template's end
    assert ((prompts == 7).sum(dim=1) > 20).all()


def test_most_frequent_tokens():
    counts = count_tokens([[3, 3, 1], torch.tensor([3, 5, 1, 0])], 8)
    assert counts.tolist() == [1, 2, 0, 3, 0, 1, 0, 0]
    assert most_frequent_tokens(counts, 3).tolist() == [0, 1, 3]
    assert most_frequent_tokens(counts, 3, always=[7]).tolist() == [1, 3, 7]
    with pytest.raises(ValueError, match=r"`size` must be between 1 and the vocabulary's 8, got 9"):
        most_frequent_tokens(counts, 9)


def test_a_draft_vocabulary_that_does_not_fit_is_refused():
    draft = small_draft(tiny_target(), draft_vocab_size=4)
    with pytest.raises(ValueError, match=r"`draft_vocab_size` of 4 entries, got 5"):
        set_draft_vocabulary(draft, torch.arange(5))
    with pytest.raises(ValueError, match=r"`token_ids` must be distinct and between 0 and 63"):
        set_draft_vocabulary(draft, torch.tensor([1, 1, 2, 3]))
    set_draft_vocabulary(draft, torch.tensor([9, 1, 2, 3]))
    assert draft.draft_token_ids.tolist() == [9, 1, 2, 3]
