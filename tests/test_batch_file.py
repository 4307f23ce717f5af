"""`examples/batch_file.py`: what is a prompt, and that no answer is lost."""

import json

import pytest
from example_scripts import example
from saved_pairs import save_tiny_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    target, draft = save_tiny_pair(tmp_path_factory.mktemp("pair"))
    return ["--target", str(target), "--draft", str(draft), "--device", "cpu", "--max-new-tokens", "4"]


def answers(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_only_line_ends_cut_prompts(tmp_path):
    read = example("batch_file").read_prompts
    prompts = ["w7 \u2028 w8", "w9 \x85 \x0c w10", "w11 \x1c \u2029"]
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(prompts).encode() + b"\n")
    assert read(tmp_path / "x.txt") == prompts
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "x.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert read(tmp_path / "x.jsonl") == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b" \n\n", r"`prompts` \(.*x.txt\) is empty"),
        ("x.txt", b"\xff\xfe", r"`prompts` \(.*x.txt\) must be UTF-8"),
        (
            "x.jsonl",
            b'{"prompt": "w7"}\n{"text": "w7"}\n',
            r"line 2 of .*x.jsonl must be a JSON object with a `prompt`",
        ),
        ("x.jsonl", b'\n["w7"]\n', r"line 2 of .*x.jsonl must be"),
        ("x.jsonl", b'{"prompt"', r"line 1 of .*x.jsonl must be"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        example("batch_file").main([str(tmp_path / name), "--output", str(tmp_path / "answers.jsonl")])


def test_answers_come_in_the_files_order_into_a_new_folder(tmp_path, models):
    prompts = ["w7 w8 w9", "w7 \u2028 w8", "w20"]
    (tmp_path / "x.txt").write_text("\n".join(prompts), encoding="utf-8")
    output = tmp_path / "new" / "deep" / "answers.jsonl"
    example("batch_file").main([str(tmp_path / "x.txt"), "--output", str(output), "--batch-size", "2", *models])
    assert [line["prompt"] for line in answers(output)] == prompts
    assert all(len(line["answer"].split()) == 4 for line in answers(output))
    assert [path.name for path in output.parent.iterdir()] == ["answers.jsonl"]


def test_an_interruption_keeps_what_is_done_and_what_was_there(tmp_path, models, monkeypatch):
    module = example("batch_file")
    answer_batch, calls = module.answer_batch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer_batch(*args)

    monkeypatch.setattr(module, "answer_batch", interrupted)
    (tmp_path / "x.txt").write_text("w7 w8 w9\nw7\nw8 w9")
    output = tmp_path / "answers.jsonl"
    output.write_text("former")
    with pytest.raises(KeyboardInterrupt):
        module.main([str(tmp_path / "x.txt"), "--output", str(output), "--batch-size", "1", *models])
    assert output.read_text() == "former"
    assert [line["prompt"] for line in answers(tmp_path / "answers.jsonl.partial")] == ["w7", "w8 w9"]


def test_mistakes_are_found_before_anything_is_loaded(tmp_path, models, capsys):
    (tmp_path / "x.txt").write_text("w7")
    main = example("batch_file").main
    with pytest.raises(ValueError, match="`output` must be a file, got the folder"):
        main([str(tmp_path / "x.txt"), "--output", str(tmp_path), "--target", "/no/where"])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "x.txt"), "--output", str(tmp_path / "y"), "--batch-size", "0"])
    assert "--batch-size: expected an integer of at least 1, got '0'" in capsys.readouterr().err
