"""Cards of the published drafts: valid metadata, the text that the table gives, results from CSV files only."""

from pathlib import Path

import pytest
import yaml
from example_scripts import example
from huggingface_hub import ModelCard, ModelCardData

from longspec_hf.published_cards import LICENSES, NOTES, PUBLISHED_DRAFTS, UNVERIFIED, make_published_card

CARDS = Path(__file__).parent.parent / "model_cards"
TAU = Path(__file__).parent.parent / "docs" / "benchmarks" / "training_tau_272m.csv"


@pytest.mark.parametrize("draft", PUBLISHED_DRAFTS, ids=lambda draft: draft.name)
def test_a_card_is_what_the_table_gives_and_valid(draft):
    path = CARDS / draft.name / "README.md"
    assert path.read_text(encoding="utf-8") == make_published_card(draft).content
    card = ModelCard.load(path)
    assert isinstance(card.data, ModelCardData)
    header = yaml.safe_load(card.content.split("---")[1])
    assert header == {
        "base_model": draft.target,
        "library_name": "transformers",
        "license": draft.license,
        "pipeline_tag": "text-generation",
        "tags": ["longspec", "speculative-decoding", "draft-model"],
    }
    assert f"longspec-hf convert {draft.source} --target {draft.target} --output {draft.name}" in card.text
    assert "Neither tau nor speed of this pair has been measured" in card.text
    assert ("has not been checked" in card.text) == (draft.license == UNVERIFIED)


def test_the_table_names_six_pairs_once():
    assert len({draft.source for draft in PUBLISHED_DRAFTS}) == len({draft.target for draft in PUBLISHED_DRAFTS}) == 6
    assert all(draft.source == f"sail/longspec-{draft.target.split('/')[1]}" for draft in PUBLISHED_DRAFTS)


def test_licences_and_notes_are_of_pairs_that_exist():
    assert {*LICENSES, *NOTES} <= {draft.source for draft in PUBLISHED_DRAFTS}
    assert {draft.source for draft in PUBLISHED_DRAFTS if draft.note} == set(NOTES)


def test_results_come_from_csv_files(tmp_path):
    results, name = tmp_path / "results", PUBLISHED_DRAFTS[0].name
    results.mkdir()
    (results / f"published_{name}_tau.csv").write_text(TAU.read_text())
    written = example("make_published_cards").main(["--folder", str(tmp_path), "--results", str(results)])
    assert [path.parent.name for path in written] == [draft.name for draft in PUBLISHED_DRAFTS]
    card = ModelCard.load(written[0])
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures["tau, beam"] == 2.95
    assert "| all | 18 | 2.95 | 4.04 | 1.98 | 2.14 |" in card.text and "Neither tau" not in card.text
    assert "Neither tau" in written[1].read_text()
