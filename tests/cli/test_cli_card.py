"""`longspec-hf card` and `train`: the card of the shipped draft from its records, and of a run made here."""

import json
import shutil
from pathlib import Path

import pytest
from saved_pairs import save_tiny_pair

from longspec_hf import LongSpecDraftModel
from longspec_hf.cli import main
from longspec_hf.pairs import SHIPPED_DRAFT, shipped_draft_folder
from longspec_hf.training.run import ScriptArguments, make_draft

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"


def test_the_shipped_card_is_what_its_records_say(tmp_path):
    folder = tmp_path / SHIPPED_DRAFT
    shutil.copytree(shipped_draft_folder(), folder)
    (folder / "README.md").unlink()
    before = ("short", "long", "short_2", "long_2", "short_3", "long_3", "short_5", "long_5")
    stages = (*before, "layer_6", "short_6", "long_6")
    runs = [str(BENCHMARKS / f"training_run_{stage}.json") for stage in stages]
    taus = [str(BENCHMARKS / f"training_tau{which}.csv") for which in ("", "_lookup")]
    assert main(["card", str(folder), "--run", *runs, "--tau", *taus]) == 0
    assert (folder / "README.md").read_text() == (shipped_draft_folder() / "README.md").read_text()


def test_a_run_from_the_command_line_and_its_card(tmp_path, capsys):
    target, _ = save_tiny_pair(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{5 + i * i % 50}" for i in range(2000)))
    command = ["train", "--target", str(target), "--target_name", "org/target", "--target_dtype", "float32"]
    command += ["--texts", str(text), "--length", "32", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    command += ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"]
    stages = [tmp_path / "short", tmp_path / "long"]
    first = ["--stage", "short", "--target_layer_idx", "0", "--output_dir", str(stages[0])]
    assert main([*command, *first]) == 0
    assert main([*command, "--stage", "long", "--draft", str(stages[0]), "--output_dir", str(stages[1])]) == 0
    draft = LongSpecDraftModel.from_pretrained(stages[1])
    assert draft.config.target_name_or_path == "org/target"
    assert draft.config.target_layer_idx == 0
    to_another = ScriptArguments(draft=str(stages[1]), target_layer_idx=1)
    assert make_draft(to_another, None, None).config.target_layer_idx == 1

    (stages[1] / "README.md").unlink()
    assert main(["card", str(stages[1])]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(stages[1] / "README.md")
    assert "| steps | 2 |" in (stages[1] / "README.md").read_text()
    # Records of several stages are told apart by their folders.
    assert main(["card", str(stages[1]), "--run", *(str(stage / "training_facts.json") for stage in stages)]) == 0
    card = (stages[1] / "README.md").read_text()
    assert "| short steps | 2 |" in card and "| long steps | 2 |" in card and "| all stages steps | 4 |" in card


def test_training_without_data_is_refused_before_the_target_is_loaded(tmp_path, capsys, monkeypatch):
    target, _ = save_tiny_pair(tmp_path)
    (target / "model.safetensors").unlink()
    assert main(["train", "--target", str(target), "--output_dir", str(tmp_path / "run")]) == 2
    assert "expected at least one source of training data" in capsys.readouterr().err


@pytest.mark.parametrize("record", [None, {}])
def test_a_card_needs_a_record(tmp_path, capsys, record):
    _, draft = save_tiny_pair(tmp_path)
    if record is not None:
        (draft / "training_facts.json").write_text(json.dumps(record))
    assert main(["card", str(draft)]) == 2
    assert "record" in capsys.readouterr().err
    assert not (draft / "README.md").exists()
