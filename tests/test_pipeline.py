"""`pipeline("text-generation")` takes the draft as it takes any assistant."""

import pytest
import torch
from models import learned
from test_stopping import byte_level_tokenizer
from transformers import pipeline


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_gives_plains_texts(target, batch_size):
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = "a", "left"
    calls = []
    draft = learned(target)
    expand = draft.next_token_logits
    draft.next_token_logits = lambda *arguments: calls.append(1) or expand(*arguments)
    arguments = {"max_new_tokens": 20, "do_sample": False, "batch_size": batch_size}
    texts = ["bcdefg", "hijklmnop"]
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)(texts, **arguments)
    assert not calls
    ours = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=draft)
    assert ours(texts, **arguments) == plain
    assert calls, "the draft was never asked"
    torch.manual_seed(0)
    assert len(ours("bcd", max_new_tokens=8, do_sample=True, num_return_sequences=2)) == 2
