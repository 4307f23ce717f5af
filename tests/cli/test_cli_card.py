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


COLUMNS = "name,kind,decoding,looping,prompt_tokens,output_tokens,tree,rounds,committed,tau,device,torch,transformers"


def _taus(path, *texts):
    """A CSV file of tau: a row for each `(kind, decoding)`."""
    rows = [f"x,{kind},{decoding},False,20,10,beam,3,9,3.0,CPU,2,5" for kind, decoding in texts]
    path.write_text("\n".join([COLUMNS, *rows]) + "\n")
    return str(path)


@pytest.fixture
def trained(tmp_path):
    """A draft's folder with the record of a run."""
    _, draft = save_tiny_pair(tmp_path)
    (draft / "training_facts.json").write_text('{"facts": {"steps": 2, "tokens": 9, "seconds": 1.0}}')
    return draft


def test_tasks_and_temperatures_are_the_rows(trained, tmp_path):
    texts = [("completion", "T=1.0 seed=1"), ("completion", "greedy"), ("completion", "T=0.5 seed=2")]
    assert main(["card", str(trained), "--tau", _taus(tmp_path / "tau.csv", *texts)]) == 0
    card = (trained / "README.md").read_text()
    assert "tokens (code completion), 0 of them" in card and "explanation" not in card and "T = 0.8" not in card
    assert "| sampled at T = 0.5 | 1 | 3.00 |\n| sampled at T = 1.0 | 1 | 3.00 |" in card
    texts = [("context 1024", "greedy"), ("letters", "greedy"), ("summary", "greedy"), ("context 4096", "greedy")]
    assert main(["card", str(trained), "--tau", _taus(tmp_path / "tau.csv", *texts)]) == 0
    card = (trained / "README.md").read_text()
    assert "(code completion, summary, letters), " in card and "sampled" not in card


def test_a_tree_that_was_not_measured_on_all_kinds_has_an_empty_cell(trained, tmp_path):
    tables = [_taus(tmp_path / f"{n}.csv", ("completion", n)) for n in ("greedy", "T=0.5 seed=1")]
    other = Path(tables[1])
    other.write_text(other.read_text().replace("beam", "chain"))
    assert main(["card", str(trained), "--tau", *tables]) == 0
    card = (trained / "README.md").read_text()
    assert "| greedy | 1 | 3.00 |  |" in card and "| sampled at T = 0.5 | 1 |  | 3.00 |" in card


def test_runs_in_folders_of_one_name_are_all_in_the_card(trained, tmp_path):
    runs = [tmp_path / name / "short" / "training_facts.json" for name in "ab"]
    for steps, run in enumerate(runs, 3):
        run.parent.mkdir(parents=True)
        run.write_text(json.dumps({"facts": {"steps": steps}, "data": {"own": f"{steps} texts"}}))
    last = trained / "training_facts.json"
    assert main(["card", str(trained), "--run", *map(str, runs), str(last)]) == 0
    card = (trained / "README.md").read_text()
    assert "| short (1) steps | 3 |" in card and "| short (2) steps | 4 |" in card and "| draft steps | 2 |" in card
    assert "stage `short (1)`" in card and "stage `short (2)`" in card and "| all stages steps | 9 |" in card


@pytest.mark.parametrize("option", ["--tau", "--more-tau"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "without the columns kind, decoding"),
        (COLUMNS + "\n", "with its header only"),
        ("", "without the columns kind, decoding"),
        (COLUMNS + "\nx,y,greedy,False,many,10,beam,3,9,3.0,CPU,2,5\n", "row 1 of"),
    ],
)
def test_other_files_are_no_tables_of_tau(trained, tmp_path, capsys, option, content, message):
    (tmp_path / "bad.csv").write_text(content)
    assert main(["card", str(trained), option, str(tmp_path / "bad.csv")]) == 2
    err = capsys.readouterr().err
    assert message in err and "bad.csv" in err and not (trained / "README.md").exists()


def test_other_files_are_no_records(trained, tmp_path, capsys):
    for content in ("steps,2", "[]", '{"facts": 3}'):
        (tmp_path / "run.json").write_text(content)
        assert main(["card", str(trained), "--run", str(tmp_path / "run.json")]) == 2
        assert "run.json" in capsys.readouterr().err


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
