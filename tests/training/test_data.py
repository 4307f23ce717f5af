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
    continue_batches,
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
from longspec_hf.training.run import ScriptArguments, load_rows


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character; `|` is the end."""
    characters = {c: i for i, c in enumerate("|abcdefghijklmnopqrstuvwxyz \n\u241e.,?'`DEGHRSTW:")}
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


def test_json_lines_may_be_blank_and_begin_with_a_mark(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b\xe2\x80\xa8c"}\n\n')
    assert list(read_texts([tmp_path / "x.jsonl"])) == ["a", "b\u2028c"]
    (tmp_path / "x.md").write_bytes(b"\xef\xbb\xbfa")
    assert list(read_texts([tmp_path / "x.md"])) == ["a"] == list(read_texts([tmp_path]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text"\n', r"line 2 of .*x.json must be a JSON object in UTF-8, got '{\"text\"' \(Expect"),
        (b'[\n  {"text": "a"}\n]\n', r"line 1 of .*x.json must be a JSON object.*got '\[' .*no array around them"),
        (b'[{"text": "a"}]\n', r"line 1 of .*x.json must be a JSON object"),
        (b'\n"x"\n', r"line 2 of .*x.json must be a JSON object in UTF-8, got '\"x\"'\."),
        ('{"text": "a"}'.encode("utf-16"), r"line 1 of .*x.json must be a JSON object in UTF-8"),
        (b'{"text": 3}\n', r"line 1 of .*x.json must have `text` or `messages`"),
        (b'{"messages": [{"role": "user"}]}\n', r"line 1 of .*x.json has `messages`, which need a `tokenizer`"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts([tmp_path / "x.json"]))


def test_messages_that_the_template_refuses_are_named(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"messages": [{"role": "system", "content": "a"}]}')
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system messages') }}")
    with pytest.raises(ValueError, match=r"line 1 of .*x.jsonl has `messages`.*no system messages"):
        list(read_texts([tmp_path / "x.jsonl"], tokenizer))


def test_a_named_file_that_is_no_utf8_is_refused(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"`paths` names .*latin.txt, expected UTF-8 text"):
        list(read_texts([file]))
    assert list(read_texts([tmp_path])) == []


def test_a_named_file_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    def refuse(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    assert list(read_texts([tmp_path])) == []
    with pytest.raises(PermissionError, match=r"a\.txt"):
        list(read_texts([tmp_path / "a.txt"]))


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


def test_a_prompt_can_be_left_unlearned(tmp_path):
    path = tmp_path / "own.npy"
    save_tokens(path, np.array([[5, 6, 7, 2, 2]], dtype=np.uint16))
    row = load_token_rows(path, 5, first_label=2)[0]
    assert row["input_ids"].tolist() == [5, 6, 7, 2, 2]
    assert row["labels"].tolist() == [-100, -100, 7, 2, -100]
    with pytest.raises(ValueError, match=r"`first_label` must be from 0 to below the 4 tokens of a row of .*, got 4"):
        load_token_rows(path, 4, first_label=4)
    save_tokens(path, np.arange(10, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"`first_label` must be 0 for .*own.npy, which has no rows, got 2"):
        load_token_rows(path, 4, first_label=2)
    assert [file.name for file in tmp_path.iterdir()] == ["own.npy"]


def test_sources_of_a_command_line_name_repetitions_and_prompts(tmp_path):
    save_tokens(tmp_path / "own.npy", np.array([[5, 6, 7, 8]], dtype=np.uint16))
    sources = [f"{tmp_path}/own.npy", f"{tmp_path}/own.npy*2", f"{tmp_path}/own.npy@3", f"{tmp_path}/own.npy@2*2"]
    rows = load_rows(ScriptArguments(tokens=sources), None, 4)
    unlearned = [int((rows[index]["labels"] == -100).sum()) for index in range(len(rows))]
    assert unlearned == [0, 0, 0, 3, 2, 2]


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


def test_a_batch_that_memory_does_not_hold_is_halved(tokenizer, monkeypatch):
    target = tiny_target()
    prompts = make_prompts(np.arange(1, 40), tokenizer, 7, 10, instructed=0.0)
    expected = continue_prompts(target, prompts, 5, 7, (0.0,))
    generate, tried, most = target.generate, [], 3

    def limited(batch, **kwargs):
        tried.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("no memory")
        return generate(batch, **kwargs)

    monkeypatch.setattr(target, "generate", limited)
    batches = list(continue_batches(target, prompts, 5, 7, (0.0,)))
    assert tried == [7, 3, 3, 1] and [len(rows) for rows in batches] == [3, 3, 1]
    assert (np.concatenate(batches) == expected).all()
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        continue_prompts(target, prompts, 5, 2, (0.0,))


def test_prompts_can_begin_where_texts_begin(tokenizer):
    texts = [np.full(length, token) for token, length in ((5, 3), (6, 30), (7, 8), (8, 40))]
    tokens = np.concatenate([np.append([9, *text], 0) for text in texts])
    prompts = make_prompts(tokens, tokenizer, 40, 20, instructed=0.0, from_start=1.0)
    assert {tuple(row.tolist()) for row in prompts} == {(9, *[6] * 19), (9, *[8] * 19)}
    anywhere = make_prompts(np.full(60, 6), tokenizer, 3, 20, instructed=0.0, from_start=1.0)  # no text has an end
    assert (anywhere == 6).all()


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
