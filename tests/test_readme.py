"""The commands of the README, from a clean clone: each runs, with models and sizes that fit a test.

`RULES` says what is changed in a command. A command that no rule is for fails, so nothing new goes untried.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT
from saved_pairs import WORDS, save_tiny_pair

TINY_RUN = "--use_cpu --report_to none --length 32 --max_steps 2 --per_device_train_batch_size 2"
RULES = {
    "make ": ({"make ": "make --dry-run "}, ""),  # the tests within the tests would never end
    "pip install -e .": ({"pip install": "pip install --dry-run --no-deps --no-build-isolation --no-index"}, ""),
    "longspec-hf generate": ({}, "--max-new-tokens 8 --device cpu"),
    "longspec-hf convert": ({"sail/longspec-QwQ-32B-Preview": "tests/data/published_layout/draft"}, ""),
    "longspec-hf bench": ({"longspec-hf": "CUDA_VISIBLE_DEVICES= longspec-hf"}, "2>&1 | grep 'needs an NVIDIA GPU'"),
    "longspec-hf env": ({}, ""),
    "python examples/generate_data.py": ({"--target embedded": "--target pair/target"}, ""),
    "longspec-hf train": ({"--target embedded": "--target pair/target", "size 16384": "size 32"}, TINY_RUN),
    "longspec-hf card": ({}, ""),
}
"""By the beginning of a command: what is replaced in it, and what is put behind it."""

NAMES = {
    '"cuda"': '"cpu"',
    "Qwen/Qwen2.5-7B-Instruct": "pair/target",
    "org/longspec-qwen2.5-7b-draft": "pair/draft",
    "max_new_tokens=512": "max_new_tokens=32",
}
"""What is replaced in Python."""

WHAT_A_CALLER_HAS = """
from transformers import AutoModelForCausalLM, AutoTokenizer
target = AutoModelForCausalLM.from_pretrained("pair/target")
inputs = AutoTokenizer.from_pretrained("pair/target")("w7 w8 w9", return_tensors="pt")
"""

SHIMS = {"python": "", "longspec-hf": "-m longspec_hf.cli"}
"""Commands that run in the warm Python: importing PyTorch and transformers takes longer than what they do."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Commands of the bash blocks, lines joined, comments cut off."""
    lines = "".join(code.replace("\\\n", " ") for language, code in blocks(text) if language == "bash").splitlines()
    return [" ".join(line.partition(" #")[0].split()) for line in lines if line.strip()]


def runnable(command: str) -> str:
    """A command with its rule applied."""
    rule = next((rule for start, rule in RULES.items() if command.startswith(start)), None)
    if rule is None:
        raise KeyError(f"README.md holds `{command}`, for which tests/test_readme.py has no rule.")
    replacements, behind = rule
    return f"{replaced(command, replacements)} {behind}".strip()


def replaced(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def scripts(text: str) -> list[str]:
    """Python blocks; one that loads no target goes on where the one before ended."""
    found = [WHAT_A_CALLER_HAS]
    for code in (code for language, code in blocks(text) if language == "python"):
        if re.search("^target = ", code, re.MULTILINE):
            found.append("")
        found[-1] += replaced(code, NAMES)
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory, warm):
    """A clone of the last commit, with the files a reader is supposed to have."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this checkout is no git repository, or git is not installed")
    folder = tmp_path_factory.mktemp("readme") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    save_tiny_pair(folder / "pair")
    (folder / "report.txt").write_text("Rivers carry sand to the sea. " * 20)
    (folder / "texts").mkdir()
    (folder / "texts" / "words.txt").write_text(" ".join(WORDS[5 + i * i % 50] for i in range(2000)))
    (folder / "bin").mkdir()
    lines = {name: f'"{warm}" {arguments}' for name, arguments in SHIMS.items()}
    lines["pip"] = f'"{sys.executable}" -m pip --disable-pip-version-check'
    for name, line in lines.items():
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return folder


def run(clone: Path, *command: str) -> str:
    """What a command prints that must succeed, in the clone."""
    places = [str(clone), str(clone / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    path = os.pathsep.join([str(clone / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=clone, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.mark.real
def test_every_command_runs(clone):
    readme = (clone / "README.md").read_text(encoding="utf-8")
    printed = {command: run(clone, "bash", "-c", runnable(command)) for command in commands(readme)}
    assert len(printed) >= 11
    assert "examples/demo.py" in printed["make demo"] and "pytest" in printed["make test"]
    assert all(text.strip() for command, text in printed.items() if command.startswith("longspec-hf generate"))
    assert (clone / "longspec-QwQ-32B-Preview" / "model.safetensors").exists()
    assert "| long steps | 2 |" in (clone / "runs" / "long" / "README.md").read_text(encoding="utf-8")


def test_the_python_runs(clone):
    first, second = scripts((clone / "README.md").read_text(encoding="utf-8"))
    python = str(clone / "bin" / "python")
    run(clone, python, "-c", first)
    printed = run(clone, python, "-c", f"{second}\nimport longspec_hf\nprint(longspec_hf.__file__)")
    assert "SpeculationStats(rounds=" in printed and printed.splitlines()[-1].startswith(str(clone))


def test_nothing_else_is_fenced():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {language for language, _ in blocks(text)} == {"bash", "python"}
    assert text.count("```") == 2 * len(blocks(text))


def test_a_command_without_a_rule_is_noticed():
    with pytest.raises(KeyError, match=r"README\.md holds `longspec-hf serve`"):
        runnable("longspec-hf serve")
