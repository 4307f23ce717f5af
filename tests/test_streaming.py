"""Streamers get the prompt, then one token a call, and the end once, as plain `generate` gives them."""

import threading

import pytest
import torch
from models import ScriptedDraft, prompt
from test_stopping import BLOCK, Recorder, byte_level_tokenizer
from transformers import TextIteratorStreamer

NEW = 20


@pytest.fixture
def drafted(target):
    ids = prompt(10, seed=4)
    free = target.generate(ids, max_new_tokens=NEW, do_sample=False)
    return ids, free, ScriptedDraft(target, free, "oracle", **BLOCK)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("end", [None, 3, 7], ids=["free", "end in a block", "end in the next"])
def test_puts_are_plains(target, drafted, do_sample, end):  # C38
    ids, free, draft = drafted
    kwargs = {"max_new_tokens": NEW, "do_sample": do_sample, "pad_token_id": 0}
    if end:
        kwargs["eos_token_id"] = int(free[0, 10 + end])
    streamers = Recorder(), Recorder()
    outputs = []
    for streamer, assistant in zip(streamers, ({}, {"assistant_model": draft}), strict=True):
        torch.manual_seed(0)
        outputs.append(target.generate(ids, streamer=streamer, **kwargs, **assistant))
    plain, ours = streamers
    assert torch.equal(*outputs)
    assert torch.equal(ours.puts[0], ids)
    assert [put.shape for put in ours.puts[1:]] == [(1,)] * (outputs[1].shape[1] - 10)
    assert [put.tolist() for put in ours.puts] == [put.tolist() for put in plain.puts]
    assert [int(put) for put in ours.puts[1:]] == outputs[1][0, 10:].tolist()
    assert ours.ended == plain.ended == 1


def test_a_text_iterator_in_a_thread_ends(target, drafted):  # C38
    ids, free, draft = drafted
    tokenizer = byte_level_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=target.generate,
        kwargs={
            "input_ids": ids,
            "max_new_tokens": NEW,
            "do_sample": False,
            "streamer": streamer,
            "assistant_model": draft,
        },
    )
    thread.start()
    text = "".join(streamer)
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert text == tokenizer.decode(free[0, 10:])
