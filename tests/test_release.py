"""The wheel: complete, and enough on a machine without Triton and without a GPU."""

import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from processes import ROOT, run_python

import longspec_hf

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "longspec_hf", "kernels", "model_cards")
SMOKE = """
import sys
sys.modules["triton"] = None  # as if it were not installed
from pathlib import Path
import torch
assert not torch.cuda.is_available()
import longspec_hf, longspec_hf_kernels
from longspec_hf.cli import main
from longspec_hf.pairs import shipped_draft_folder
from longspec_hf_kernels.backends import available_backends
site = Path(sys.argv[1])
assert all(Path(part.__file__).is_relative_to(site) for part in (longspec_hf, longspec_hf_kernels))
assert available_backends(torch.empty(1, 1, 1, 64)) == ("torch",)
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
target = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
draft = longspec_hf.LongSpecDraftModel.from_target(target, sliding_window=16)
ids = torch.tensor([[7, 8, 9]])
settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
out = target.generate(ids, assistant_model=draft, return_dict_in_generate=True, **settings)
assert torch.equal(out.sequences, target.generate(ids, **settings)) and out.speculation_stats.rounds > 0
assert shipped_draft_folder().is_relative_to(site)
assert longspec_hf.LongSpecDraftModel.from_pretrained(shipped_draft_folder()).config.hidden_size == 576
assert main(["env"]) == 0
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy so that nothing is left here."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, copy / name)
    run_pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", copy / "dist", copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


def run_pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_wheel_holds_everything_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(name).decode() for name in names if name.endswith("METADATA"))
    sources = {path.relative_to(ROOT) for path in (ROOT / "longspec_hf").rglob("*.py")}
    sources |= {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")}
    expected = {str(path) for path in sources}
    expected |= {f"{package}/py.typed" for package in ("longspec_hf", "longspec_hf_kernels")}
    expected |= {f"longspec_hf/shipped_draft/{name}" for name in ("README.md", "config.json", "model.safetensors")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert f"Version: {longspec_hf.__version__}\n" in metadata and "License-Expression: Apache-2.0\n" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert {line.split()[1].split(">")[0] for line in required} == {
        "torch",
        "transformers",
        "huggingface-hub",
        "safetensors",
    }


def test_an_installed_wheel_needs_neither_triton_nor_a_gpu(wheel, tmp_path):
    site = tmp_path / "site"
    run_pip("install", "--no-compile", "--no-deps", "--no-index", "--quiet", "--target", site, wheel)
    assert (site / "bin" / "longspec-hf").exists()
    lines = run_python(SMOKE, tmp_path, site, path=[site], CUDA_VISIBLE_DEVICES="")
    assert f"longspec-hf: {longspec_hf.__version__}" in lines


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == longspec_hf.__version__
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    paper = citation["preferred-citation"]
    assert "2502.17421" in paper["url"] and len(paper["authors"]) == 7
    assert f"\n## {longspec_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
