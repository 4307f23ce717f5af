"""The examples run on the embedded target and its shipped draft, and say what plain decoding says."""

import io
import json
import threading
from dataclasses import replace

import pytest
import torch
from example_scripts import example
from saved_pairs import word_tokenizer

from longspec_hf.pairs import load_pair

RUNNABLE = ["batch_file", "chat", "complete_code", "long_reasoning", "stream", "summarize_document"]
# A chain of two: on a CPU a forward over many tokens costs many times one over a single token.
SHORT = ["--max-new-tokens", "6", "--tree-shape", "1", "1", "--ngram-branch-length", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def pair():
    return load_pair(device="cpu")


@pytest.fixture(autouse=True)
def _loaded_once(request, monkeypatch):
    if "pair" in request.fixturenames:
        pair = request.getfixturevalue("pair")
        monkeypatch.setattr("longspec_hf.cli.options.load_pair", lambda *args: pair)


@pytest.mark.parametrize("name", RUNNABLE)
def test_help(capsys, name):
    with pytest.raises(SystemExit) as end:
        example(name).main(["--help"])
    assert end.value.code == 0
    assert f"python examples/{name}.py" in capsys.readouterr().out


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("summarize_document", ["--document-tokens", "300"]),
        ("complete_code", ["--prompt-tokens", "600", "--line", "20"]),
        ("long_reasoning", []),
        ("stream", ["--temperature", "0.8", "--seed", "2"]),
        ("chat", ["--say", "Name a river.", "And a longer one?"]),
    ],
)
def test_an_example_says_what_plain_decoding_says(pair, capsys, name, arguments):
    example(name).main([*arguments, *SHORT])
    with_draft = capsys.readouterr()
    example(name).main([*arguments, *SHORT, "--plain"])
    plain = capsys.readouterr()
    assert with_draft.out == plain.out and with_draft.out.strip()
    assert "tau" in with_draft.err and "without speculation: no draft" in plain.err


@pytest.mark.real
def test_a_file_is_answered_in_its_order(pair, tmp_path, capsys):
    prompts = ["Name one long river of Europe, in one word.", "Say hi.", "2 + 2 ="]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    output = tmp_path / "answers.jsonl"
    example("batch_file").main([str(tmp_path / "prompts.txt"), "--output", str(output), "--batch-size", "2", *SHORT])
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in found] == prompts
    alone = tmp_path / "alone.jsonl"
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": prompts[1]}))
    example("batch_file").main([str(tmp_path / "one.jsonl"), "--output", str(alone), *SHORT])
    assert json.loads(alone.read_text()) == found[1]
    assert capsys.readouterr().err.count("prompt tokens") == 3


@pytest.mark.real
def test_the_chat_reads_only_what_is_new(pair):
    chat = example("chat").main(["--say", "Name a river.", *SHORT])
    rows, before = chat.cache.get_seq_length(), chat.ids.shape[1]
    assert rows == before - 1
    lengths = []
    handle = pair.target.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        chat.say("And a longer one?")
    finally:
        handle.remove()
    text = pair.tokenizer.decode(chat.ids[0])
    assert text.startswith(pair.tokenizer.apply_chat_template(chat.messages[:1], tokenize=False)[:-1])
    assert text.count("<|im_start|>assistant") == 2 and "And a longer one?<|im_end|>" in text
    assert lengths[0] < before < chat.cache.get_seq_length()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


@pytest.mark.real
def test_a_template_that_rewrites_the_past_starts_the_cache_anew(pair):
    chat = example("chat").main(["--say", "Name a river.", *SHORT])
    chat.messages[0]["content"] = "Name a lake."
    chat.say("And a longer one?")
    text = pair.tokenizer.decode(chat.ids[0])
    assert "river" not in text.split("<|im_start|>assistant")[0] and "Name a lake." in text
    plain = pair.target.generate(
        chat.ids[:, : -chat.generation_config.max_new_tokens], max_new_tokens=6, do_sample=False, pad_token_id=2
    )
    assert torch.equal(plain[:, : chat.ids.shape[1]], chat.ids)
    assert chat.cache.get_seq_length() == chat.ids.shape[1] - 1


@pytest.mark.real
def test_an_error_in_the_streams_thread_is_raised_in_the_loop(pair):
    module = example("stream")
    wrong = replace(pair, draft=torch.nn.Linear(1, 1))
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    config = pair.target.generation_config
    raised = []

    def consume():
        try:
            list(module.stream(wrong, inputs, config))
        except Exception as error:
            raised.append(error)

    # In a thread that may be left behind: a loop that waits for ever must fail this test, not hang it.
    thread = threading.Thread(target=consume, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert len(raised) == 1 and "Linear" in str(raised[0])


def test_chat_ends_at_an_empty_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nworld\n\nnever\n"))
    assert list(example("chat").read_messages()) == ["hello", "world"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert list(example("chat").read_messages()) == ["hello"]


def test_related_files_come_nearest_and_whole():
    pack = example("complete_code").pack
    tokenizer = word_tokenizer()
    others = {"a.py": "alpha beta", "b.py": "alpha gamma gamma", "c.py": "other " * 200}
    everything = pack(tokenizer, others, "x.py", "alpha gamma =", budget=100)
    assert everything == "# a.py\nalpha beta\n\n# b.py\nalpha gamma gamma\n\n# x.py\nalpha gamma ="
    assert pack(tokenizer, others, "x.py", "alpha gamma =", budget=10) == everything[everything.index("# b.py") :]
    assert pack(tokenizer, others, "x.py", "alpha gamma =", budget=5) == "# x.py\nalpha gamma ="
    with pytest.raises(ValueError, match="`prompt_tokens` must hold at least the unfinished file"):
        pack(tokenizer, others, "x.py", "alpha gamma =", budget=4)


def test_the_unfinished_file_is_not_packed(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("x.py", "deep/y.py", "z.txt"):
        (tmp_path / name).write_text(name)
    assert example("complete_code").read_others(tmp_path, tmp_path / "x.py", "*.py") == {"deep/y.py": "deep/y.py"}


@pytest.mark.parametrize("arguments", [[], ["stats.py"]])
def test_code_to_complete_must_be_named_and_lie_in_its_folder(tmp_path, arguments):
    (tmp_path / "folder").mkdir()
    files = [str(tmp_path / name) for name in arguments]
    with pytest.raises(ValueError, match="`file` must"):
        example("complete_code").main([str(tmp_path / "folder"), *files])


def test_a_long_document_is_cut_and_that_is_said(capsys):
    cut = example("summarize_document").cut
    assert cut(word_tokenizer(), "w7 w8 w9", 3) == "w7 w8 w9" and capsys.readouterr().err == ""
    assert cut(word_tokenizer(), "w7 w8 w9", 2) == "w7 w8"
    assert "has 3 tokens; the first 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="leaves no room"):
        cut(word_tokenizer(), "w7", 0)
