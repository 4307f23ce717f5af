"""The command line as a whole: help, errors, exit codes, hand-over."""

import os
import sys
import types

import pytest
import torch

import longspec_hf
from longspec_hf.cli import main
from longspec_hf.cli.main import COMMANDS


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(command.__name__.rsplit(".", 1)[1] in out for command in COMMANDS)


@pytest.mark.parametrize("command", ["generate", "convert", "train", "card", "export", "env"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"longspec-hf {command}" in capsys.readouterr().out


def test_env_says_what_a_bug_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("LONGSPEC_ATTENTION", "torch")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"longspec-hf: {longspec_hf.__version__}\n" in out and f"torch: {torch.__version__}\n" in out
    assert "tree attention for float32: torch" in out and "LONGSPEC_ATTENTION: torch" in out
    assert "hf_secret" not in out


def test_a_mistake_is_one_line(capsys, tmp_path):
    assert main(["card", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"longspec-hf card: `draft` must be the folder of a draft, got '{tmp_path}' without a config.json.\n"
    )
    assert captured.out == ""
    assert main(["--traceback", "card", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_file_is_no_users_mistake(capsys):
    assert main(["generate", "/no/such/file"]) == 1
    assert "No such file" in capsys.readouterr().err


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("longspec_hf.cli.card.run", lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["card", "x"])


def test_unknown_options_are_refused_but_for_train(capsys):
    with pytest.raises(SystemExit) as end:
        main(["env", "--verbose"])
    assert end.value.code == 2
    assert "unrecognized arguments: --verbose" in capsys.readouterr().err


def test_convert_hands_over(capsys, monkeypatch):
    calls = []
    convert = types.ModuleType("longspec_hf.convert")
    convert.convert_checkpoint = lambda source, **options: calls.append((source, *options.values()))
    monkeypatch.setitem(sys.modules, "longspec_hf.convert", convert)
    assert main(["convert", "sail/longspec-x", "--output", "out"]) == 0
    more = ["--target", "org/x", "--revision", "v2", "--dtype", "bfloat16"]
    assert main(["convert", "sail/longspec-x", *more, "--output", "out"]) == 0
    assert calls == [
        ("sail/longspec-x", None, "out", None, None),
        ("sail/longspec-x", "org/x", "out", "v2", "bfloat16"),
    ]
    assert capsys.readouterr().out == "out\nout\n"


def test_a_closed_pipe_ends_quietly(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(["env"]) == 0


def test_an_interrupt_has_its_exit_code(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("longspec_hf.cli.export.run", interrupt)
    assert main(["export", "x", "--output", "y"]) == 130
