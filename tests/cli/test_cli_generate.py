"""`longspec-hf generate`: where prompts come from, what goes where, the same text as without a draft."""

import io

import pytest
from saved_pairs import save_tiny_pair

from longspec_hf.cli import main
from longspec_hf.tree_choice import TreeChooser


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    target, draft = save_tiny_pair(tmp_path_factory.mktemp("pair"))
    return ["--target", str(target), "--draft", str(draft), "--max-new-tokens", "40"]


def generated(capsys, *arguments):
    """`(stdout, stderr)` of a command that succeeds."""
    capsys.readouterr()
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr()


@pytest.mark.parametrize("options", [[], ["--temperature", "0.9", "--top-k", "20", "--seed", "3"]])
def test_the_text_is_the_plain_one(capsys, models, options):
    with_draft = generated(capsys, "--prompt", "w7 w8 w9", *models, *options)
    plain = generated(capsys, "--prompt", "w7 w8 w9", "--plain", *models, *options)
    assert with_draft.out == plain.out and len(with_draft.out.split()) > 10
    assert "tau" in with_draft.err
    assert "5 prompt tokens" in with_draft.err  # with the template's two
    assert "without speculation: no draft was given" in plain.err and "tau" not in plain.err


def test_prompts_from_everywhere(capsys, models, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("w7 w8")
    texts = [generated(capsys, "--prompt", "w7 w8", *models).out, generated(capsys, str(file), *models).out]
    for place in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("w7 w8"))
        texts.append(generated(capsys, *place, *models).out)
    assert len(set(texts)) == 1
    assert generated(capsys, "--prompt", "w9", *models).out != texts[0]


def test_template_system_message_and_silence(capsys, models):
    texts = {
        generated(capsys, "--prompt", "w7", *models, *options).out
        for options in ([], ["--no-chat"], ["--system", "w20"])
    }
    assert len(texts) == 3
    assert "tau" not in generated(capsys, "--prompt", "w7", "--quiet", *models).err


def test_a_template_without_system_messages_says_so(capsys, tmp_path):
    target, draft = save_tiny_pair(tmp_path)
    (target / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    pair = ["--target", str(target), "--draft", str(draft)]
    assert main(["generate", *pair, "--prompt", "w7", "--system", "w8"]) == 2
    err = capsys.readouterr().err
    assert "`system` must be a message that the target's chat template takes" in err
    assert "System role not supported" in err


def test_tree_options_reach_the_call(capsys, models):
    nothing = ["--tree-shape", "--ngram-branch-length", "0", "--no-fallback-to-plain"]
    err = generated(capsys, "--prompt", "w7", *models, *nothing, "--repetition-penalty", "1.0").err
    assert "tau 1.00; 39 rounds, accepted per depth: none" in err
    assert main(["generate", "--prompt", "w7", *models, "--tree-shape", "0"]) == 2
    assert "`tree_shape` must hold integers of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [["auto"], ["2", "2"]])
def test_trees_of_the_rounds_are_named(capsys, models, shape, monkeypatch):
    monkeypatch.setattr(TreeChooser, "choose", lambda self, *_: self.settings if self.fixed else _next_tree(self))
    out, err = generated(capsys, "--prompt", "w7", *models, "--no-fallback-to-plain", "--tree-shape", *shape)
    assert ("rounds by tree: " in err) == (shape == ["auto"])
    assert out == generated(capsys, "--prompt", "w7", "--plain", *models).out


def _next_tree(chooser):
    trees = list(chooser.trees)
    chooser.settings = trees[(trees.index(chooser.settings) + 1) % len(trees)]
    return chooser.settings


@pytest.mark.parametrize(
    ("shape", "message"),
    [(["Auto"], "expected auto or numbers, got 'Auto'"), (["auto", "4"], "expected auto or numbers, got both")],
)
def test_other_shapes_are_refused(capsys, models, shape, message):
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "w7", *models, "--tree-shape", *shape])
    assert message in capsys.readouterr().err


def test_a_text_beyond_the_context_is_said(capsys, models):
    assert "exceed the 8192" in generated(capsys, "--prompt", "w7 " * 8170, *models, "--tree-shape", "1").err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["file", "--prompt", "w7"], "`file` (file) and `prompt` were both given"),
        (["--prompt", " "], "the prompt is empty, expected a text"),
        (["--prompt", "w7", "--top-p", "0.9"], "`top_p` (0.9) needs sampling"),
        (["--prompt", "w7", "--temperature", "-1"], "`temperature` must not be negative"),
        (["--prompt", "w7", "--max-new-tokens", "0"], "`max_new_tokens` must be at least 1"),
        (["--prompt", "w7", "--draft", "/no/such"], "`draft` must be a Hub id or a folder"),
    ],
)
def test_mistakes(capsys, models, options, message):
    assert main(["generate", *models, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("longspec-hf generate: ")
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_a_terminal_without_a_prompt(capsys, models, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert main(["generate", *models]) == 2
    assert "no prompt was given" in capsys.readouterr().err
