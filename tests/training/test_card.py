"""The model card says what was recorded, with metadata the Hub accepts; adapters; the hub folder."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl
from models import tiny_target
from peft import LoraConfig, get_peft_model
from runs import losses, random_rows, small_draft, small_trainer

from longspec_hf import LongSpecDraftConfig
from longspec_hf.model_card import make_model_card
from longspec_hf.training import TauEvaluator, TauInput


def _card(**fields):
    config = LongSpecDraftConfig.from_target(tiny_target().config, target_name_or_path="owner/target")
    return make_model_card(config, "draft", **fields)


def test_metadata_is_valid_and_holds_the_results():
    card = _card(taus={"beam": 3.14159, "chain": 2.0}, training={"steps": 12345, "final_kl": 0.123456})
    header = yaml.safe_load(card.content.split("---")[1])
    assert header["base_model"] == "owner/target"
    assert header["library_name"] == "transformers"
    assert {"longspec", "speculative-decoding"} <= set(header["tags"])
    results = {m["name"]: m["value"] for r in header["model-index"][0]["results"] for m in r["metrics"]}
    assert results == {"tau, beam": 3.142, "tau, chain": 2.0}
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    assert "| steps | 12,345 |" in card.content and "| final kl | 0.1235 |" in card.content


def test_a_path_is_no_base_model():
    config = LongSpecDraftConfig.from_target(tiny_target().config, target_name_or_path="/some/folder")
    assert "base_model" not in yaml.safe_load(make_model_card(config, "draft").content.split("---")[1])
    assert "model-index" not in make_model_card(config, "draft").content


@pytest.mark.parametrize("name", ["pair/target", "C:/target", "C:\\\\target/x", "a/b/c", "./target", "~/target"])
def test_a_folder_here_and_a_path_with_a_drive_are_no_base_model(tmp_path, monkeypatch, name):
    (tmp_path / "pair" / "target").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = LongSpecDraftConfig.from_target(tiny_target().config, target_name_or_path=name)
    assert make_model_card(config, "draft").data.base_model is None
    config.target_name_or_path = "pair/other"
    assert make_model_card(config, "draft").data.base_model == "pair/other"


def test_the_trainer_writes_the_card_of_its_run(tmp_path):
    texts = [TauInput(list(range(1, 20)), list(range(20, 40)))]
    trainer = small_trainer(tmp_path / "my-draft", max_steps=6)
    trainer.tau_evaluator = TauEvaluator(texts)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card()
    card = (tmp_path / "my-draft" / "README.md").read_text()
    assert "# my-draft" in card and "| steps | 6 |" in card
    assert f"| tokens | {6 * 4 * 23:,} |" in card  # 6 steps of 4 rows of 24 tokens
    assert f"| beam | {metrics['eval_tau_beam']:.4g} |" in card
    assert metrics["eval_tau_lookup"] >= 1


def test_push_to_hub_uploads_draft_and_card(tmp_path, monkeypatch):
    """What would be uploaded: nothing of the target."""
    uploaded = {}

    def upload_folder(self, *, folder_path, **kwargs):
        uploaded.update({path.name: path.stat().st_size for path in Path(folder_path).iterdir() if path.is_file()})

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", lambda *a, **k: RepoUrl("https://huggingface.co/owner/draft"))
    trainer = small_trainer(tmp_path, hub_model_id="owner/draft", max_steps=1)
    trainer.train()
    trainer.push_to_hub(blocking=True)
    assert {"README.md", "config.json", "model.safetensors"} <= set(uploaded)
    size = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert uploaded["model.safetensors"] == pytest.approx(size, rel=0.1)


def test_adapters_train_and_merge(tmp_path):
    """LoRA on the draft: only the adapters move, and the merged draft is an ordinary one."""
    target = tiny_target()
    draft = small_draft(target)
    before = {name: p.clone() for name, p in draft.named_parameters()}
    adapted = get_peft_model(draft, LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    trainer = small_trainer(tmp_path, target, adapted, rows=random_rows(rows=8), max_steps=20)
    trainer.train()
    assert sum(losses(trainer)[-4:]) < sum(losses(trainer)[:4])
    merged = adapted.merge_and_unload()
    moved = {name for name, p in merged.named_parameters() if not (p == before[name]).all()}
    assert moved == {name for name in before if name.split(".")[-2] in ("q_proj", "o_proj", "down_proj")}
