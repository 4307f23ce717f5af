"""`trust_remote_code=True`: the exported folder loads where the package is installed and says so where it is not."""

import json
import shutil

import pytest
from processes import run_python
from saved_pairs import save_tiny_pair

from longspec_hf import LongSpecDraftModel
from longspec_hf.cli import main
from longspec_hf.remote_code import CODE_FILE, export_with_remote_code

LOAD = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
assert "longspec_hf" not in sys.modules
target = AutoModelForCausalLM.from_pretrained(sys.argv[2]).eval()
sys.modules["longspec_hf"] = None  # as if it were not installed
try:
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(error)
del sys.modules["longspec_hf"]
drafts = [auto.from_pretrained(sys.argv[1], trust_remote_code=True) for auto in (AutoModel, AutoModelForCausalLM)]
import longspec_hf
ids = torch.tensor([[7, 8, 9]])
settings = {"max_new_tokens": 12, "do_sample": False}
plain = target.generate(ids, **settings)
for draft in drafts:
    assert isinstance(draft, longspec_hf.LongSpecDraftModel)
    out = target.generate(ids, assistant_model=draft, return_dict_in_generate=True, **settings)
    assert torch.equal(out.sequences, plain) and out.speculation_stats.rounds > 0
# Saving a draft of the package writes no code, though one of the remote kind was loaded.
print(longspec_hf.LongSpecDraftModel._auto_class, longspec_hf.LongSpecDraftConfig._auto_class)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    target, draft = save_tiny_pair(tmp_path_factory.mktemp("pair"))
    (draft / "README.md").write_text("The card.")
    return target, draft


def test_it_loads_with_the_package_and_says_what_is_missing_without(warm_torch, saved, tmp_path, capsys):
    target, draft = saved
    folder = tmp_path / "exported"
    assert main(["export", str(draft), "--output", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    message, marks = run_python(LOAD, tmp_path, folder, target, python=warm_torch)
    assert "Run `pip install longspec-hf`" in message
    assert marks == "None None"


def test_the_export_is_the_draft_and_one_file_more(saved, tmp_path):
    _, draft = saved
    folder = export_with_remote_code(draft, tmp_path / "exported")
    assert {path.name for path in folder.iterdir()} == {path.name for path in draft.iterdir()} | {CODE_FILE}
    assert (folder / "model.safetensors").read_bytes() == (draft / "model.safetensors").read_bytes()
    fields = json.loads((folder / "config.json").read_text())
    auto_map = fields.pop("auto_map")
    assert fields == json.loads((draft / "config.json").read_text())
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    # It stays an ordinary draft for those who import the package.
    assert LongSpecDraftModel.from_pretrained(folder).config.draft_vocab_size == 32


def test_what_training_left_stays_behind(saved, tmp_path):
    _, draft = saved
    run = tmp_path / "run"
    shutil.copytree(draft, run)
    (run / "checkpoint-2").mkdir()
    shutil.copy(draft / "model.safetensors", run / "checkpoint-2")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "trainer_state.json", "rng_state_0.pth"):
        (run / name).touch()
    folder = export_with_remote_code(run, tmp_path / "deep" / "exported")
    assert {path.name for path in folder.iterdir()} == {path.name for path in draft.iterdir()} | {CODE_FILE}
    assert [path.name for path in folder.parent.iterdir()] == ["exported"]


def test_an_interrupted_export_leaves_nothing(saved, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("shutil.copytree", fail)
    with pytest.raises(OSError, match="No space"):
        export_with_remote_code(saved[1], tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_a_draft_without_weights_is_not_exported(saved, tmp_path, capsys):
    draft = tmp_path / "draft"
    shutil.copytree(saved[1], draft)
    (draft / "model.safetensors").rename(draft / "training_args.bin")
    assert main(["export", str(draft), "--output", str(tmp_path / "x")]) == 2
    assert "`draft` must hold weights" in capsys.readouterr().err
    for content, message in (("[]", "with one JSON object, got a list"), ("{", "cannot be read")):
        (draft / "config.json").write_text(content)
        assert main(["export", str(draft), "--output", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_exported(saved, tmp_path):
    target, draft = saved
    with pytest.raises(ValueError, match=r"`draft` must be a folder or a Hub id of a LongSpec draft, got .*'llama'"):
        export_with_remote_code(target, tmp_path / "x")
    with pytest.raises(ValueError, match="`output_dir` must be a new or empty folder"):
        export_with_remote_code(draft, draft)
    with pytest.raises(ValueError, match="`output_dir` must not lie in the draft's own folder"):
        export_with_remote_code(draft, draft / "exported")
    assert not (tmp_path / "x").exists()
