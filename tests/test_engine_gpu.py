"""Captured rounds on a GPU: the tokens of uncaptured ones, and of plain decoding. Run with `pytest -m gpu`."""

import threading
from unittest.mock import Mock

import pytest
import torch
from models import ScriptedDraft, learned, prompt, tiny_target
from rounding import equal_but_for_rounding
from transformers.generation.streamers import BaseStreamer

from longspec_hf.bench.counting import GuessingDraft, guessing_draft, make_counting
from longspec_hf.engine import Engine
from longspec_hf.engine.capture import Captured
from longspec_hf.engine.host_copies import HostCopies
from longspec_hf.hook import _Runner
from longspec_hf.pacing import Pacer
from longspec_hf.text import TokenDrawer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SIZES = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}  # a head size the kernel takes


def call(model, ids, draft=None, **kwargs):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 60, "do_sample": False, **kwargs}
    return model.generate(ids, assistant_model=draft, return_dict_in_generate=True, **options)


@pytest.fixture
def replays(monkeypatch):
    """Counts replays."""
    count = [0]
    original = torch.cuda.CUDAGraph.replay

    def replay(self):
        count[0] += 1
        original(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("window", "ahead"), [(64, 1), (16, 0)], ids=["beams ahead", "paths beyond the window"])
def test_captured_equals_uncaptured(window, ahead, dtype, sample, replays, monkeypatch):
    model = tiny_target(dtype=dtype, initializer_range=0.1, **SIZES).cuda()
    draft = learned(model, sliding_window=window)
    for length in (3, 40, 700):
        ids = prompt(length, seed=length).cuda()
        texts = []
        for captured in (True, False):
            before = replays[0]
            with monkeypatch.context() as patch:
                if not captured:
                    patch.setattr(Captured, "prepare", lambda self: None)
                torch.manual_seed(1)
                out = call(model, ids, draft, do_sample=sample)
            rounds = out.speculation_stats.rounds
            parts = 3 if sample else 2
            # The draft's very first round compiles kernels; later calls are captured at once. The last round is
            # followed by a beam for a next one, where beams are drafted ahead.
            replayed = rounds - 1 if length == 3 else rounds
            assert replays[0] - before == (parts * replayed + ahead if captured else 0)
            texts.append(out.sequences)
        assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_greedy_equals_plain(dtype, replays):
    model = tiny_target(dtype=dtype, initializer_range=0.1, **SIZES).cuda()
    for length in (3, 40, 700):
        ids = prompt(length, seed=length).cuda()
        plain = call(model, ids).sequences
        out = call(model, ids, learned(model)).sequences
        assert equal_but_for_rounding(model, plain, out), length
    assert replays[0] > 20


def test_sampling_is_plain_seed_for_seed(replays):
    model = tiny_target(initializer_range=0.1, **SIZES).cuda()
    ids = prompt(40, seed=2).cuda()
    draft = learned(model)
    for seed in range(5):
        torch.manual_seed(seed)
        plain = call(model, ids, do_sample=True, temperature=0.8).sequences
        torch.manual_seed(seed)
        assert torch.equal(call(model, ids, draft, do_sample=True, temperature=0.8).sequences, plain)
    assert replays[0] > 20


def test_a_batch_whose_rows_end(replays):
    model = tiny_target(initializer_range=0.1, **SIZES).cuda()
    rows = [prompt(length, seed=length) for length in (5, 40, 300)]
    ids = torch.cat([torch.nn.functional.pad(row, (300 - row.shape[1], 0)) for row in rows]).cuda()
    mask = torch.tensor([[0] * (300 - row.shape[1]) + [1] * row.shape[1] for row in rows]).cuda()
    end = int(call(model, ids, attention_mask=mask).sequences[1, 320])
    kwargs = {"attention_mask": mask, "eos_token_id": end, "pad_token_id": 0}
    assert torch.equal(call(model, ids, learned(model), **kwargs).sequences, call(model, ids, **kwargs).sequences)
    assert replays[0] > 5


def test_buffers_that_grow_are_captured_anew(replays, monkeypatch):
    monkeypatch.setattr("longspec_hf.cache_layer.GROWTH_ROWS", 64)
    monkeypatch.setattr("longspec_hf.hook.GROWTH_ROWS", 64)
    model = tiny_target(initializer_range=0.1, **SIZES).cuda()
    ids = prompt(50, seed=3).cuda()
    kwargs = {"max_new_tokens": 400}
    plain = call(model, ids, **kwargs).sequences
    assert torch.equal(call(model, ids, learned(model, sliding_window=16), **kwargs).sequences, plain)


@pytest.mark.parametrize("nodes", [16, 64])
def test_a_call_within_a_streamer_of_another(nodes, replays):
    """Graphs of the outer call are replayed after the inner call's, of the same streams, are destroyed."""
    model = tiny_target(initializer_range=0.1, **SIZES).cuda()
    draft = learned(model, max_tree_nodes=nodes)
    outer, inner = prompt(40, seed=2).cuda(), prompt(90, seed=3).cuda()
    expected, within = call(model, outer).sequences, call(model, inner).sequences

    class Nesting(BaseStreamer):
        puts, same = 0, []

        def put(self, value):
            self.puts += 1
            if self.puts % 7 == 0:
                self.same.append(torch.equal(call(model, inner, draft).sequences, within))
                torch.cuda.empty_cache()

        def end(self):
            pass

    streamer = Nesting()
    assert torch.equal(call(model, outer, draft, streamer=streamer).sequences, expected)
    assert len(streamer.same) > 2 and all(streamer.same) and replays[0] > 20


def test_rounds_wait_for_their_tokens_alone(monkeypatch):
    """Nothing else may wait for the device, which drafts ahead: PyTorch raises where a copy or a read would."""
    model = tiny_target(initializer_range=0.1, **SIZES).cuda()
    draft = learned(model, fallback_to_plain=False, ngram_branch_length=0)
    ids, options = prompt(40, seed=2).cuda(), {"max_new_tokens": 100}
    plain = call(model, ids, **options).sequences
    call(model, ids, draft, **options)  # compiles
    count, greedy_round, close = [0], Engine.greedy_round, Engine.close

    def watched(self, settings):
        count[0] += 1
        if count[0] == 3:
            torch.cuda.set_sync_debug_mode("error")
        return greedy_round(self, settings)

    def closed(self):
        torch.cuda.set_sync_debug_mode("default")
        close(self)

    monkeypatch.setattr(Engine, "greedy_round", watched)
    monkeypatch.setattr(Engine, "close", closed)
    streamer = Mock(spec=BaseStreamer)
    out = call(model, ids, draft, streamer=streamer, **options).sequences
    assert count[0] > 10 and streamer.put.call_count > 100
    assert equal_but_for_rounding(model, plain, out)


def test_rounds_are_captured_while_the_device_reads_the_prompt(monkeypatch):
    """Between the prefill and the first token nothing waits for the device, which is given more to do for that."""
    model = tiny_target(initializer_range=0.1, **SIZES).cuda()
    draft = learned(model, fallback_to_plain=True)
    ids = prompt(700, seed=2).cuda()
    plain = call(model, ids).sequences
    expected = call(model, ids, draft).sequences  # compiles
    assert equal_but_for_rounding(model, plain, expected)
    captured, ahead = [0], []
    prefill, draw, begin = _Runner.prefill, TokenDrawer.draw, torch.cuda.CUDAGraph.capture_begin

    def busy_prefill(self):
        logits = prefill(self)
        torch.cuda._sleep(10**9)  # half a second
        torch.cuda.set_sync_debug_mode("error")
        return logits

    def watched_draw(self, logits):
        torch.cuda.set_sync_debug_mode("default")
        ahead.append((captured[0], torch.cuda.current_stream().query()))
        return draw(self, logits)

    def counted(self, *args, **kwargs):
        captured[0] += 1
        begin(self, *args, **kwargs)

    monkeypatch.setattr(_Runner, "prefill", busy_prefill)
    monkeypatch.setattr(TokenDrawer, "draw", watched_draw)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", counted)
    try:
        out = call(model, ids, draft).sequences
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)
    assert ahead[0] == (3, False)  # beam, trees and, since the first call has taken some, plain steps


def test_what_was_prepared_and_not_run_is_not_captured_cold(monkeypatch):
    """A plain step prepared ahead in a call that never takes one has run no kernel: the next call runs it first."""
    model = tiny_target(initializer_range=0.1, **SIZES).cuda()
    ids = prompt(40, seed=2).cuda()
    plain = call(model, ids).sequences
    monkeypatch.setattr(HostCopies, "device_is_busy", lambda self: True)
    draft = learned(model, fallback_to_plain=True)
    depths, close = [], Engine.close

    def closed(self):
        depths.append({settings.depth for name, settings, *_ in self._warm if name == "greedy"})
        close(self)

    monkeypatch.setattr(Engine, "close", closed)
    monkeypatch.setattr(Pacer, "speculates", lambda self: True)
    outs = [call(model, ids, draft).sequences for _ in range(2)]
    assert len(depths) == 2 and all(0 not in warm for warm in depths)
    monkeypatch.setattr(Pacer, "speculates", lambda self: self.rounds < 3)
    outs += [call(model, ids, draft).sequences for _ in range(2)]
    assert all(0 in warm for warm in depths[2:])
    assert all(equal_but_for_rounding(model, plain, out) for out in outs)


def test_what_is_fetched_is_of_its_point_of_the_stream():
    copies = HostCopies(torch.device("cuda"))
    tensor = torch.zeros(2, 3, dtype=torch.long, device="cuda")
    reads = []
    for step in range(20):
        copies.send([[step] * 3, [-step] * 3], tensor)
        reads.append(copies.fetch(tensor))
        tensor.fill_(99)
    assert [read() for read in reads] == [[[step] * 3, [-step] * 3] for step in range(20)]


def test_threads_capture_and_replay_side_by_side():
    model = tiny_target(initializer_range=0.1, **SIZES).cuda()
    draft = learned(model)
    inputs = [prompt(length, seed=length).cuda() for length in (20, 90, 400)]
    plain = [call(model, ids).sequences for ids in inputs]
    outs = [None] * len(inputs)

    def work(index):
        for _ in range(3):
            with torch.cuda.stream(torch.cuda.Stream()):
                outs[index] = call(model, inputs[index], draft).sequences
                torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(plain, outs, strict=True))


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_what_cannot_be_captured_runs_uncaptured(replays, sample):
    """A draft that asks the host: the call goes on without graphs, and the next one is captured."""
    model = tiny_target(initializer_range=0.1, **SIZES).cuda()
    ids = prompt(40, seed=5).cuda()
    torch.manual_seed(1)
    plain = call(model, ids, do_sample=sample).sequences
    draft = ScriptedDraft(model, plain.cpu(), "noisy").cuda()  # its script stays on the CPU

    def ask_the_host(hidden, head, token_ids, position_ids, answer=draft.next_token_logits):
        return answer(hidden, head, token_ids.cpu(), position_ids.cpu()).cuda()

    draft.next_token_logits = ask_the_host
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="Rounds are not captured"):
        assert torch.equal(call(model, ids, draft, do_sample=sample).sequences, plain)
    assert replays[0] == 0
    other = learned(model)
    torch.manual_seed(1)
    assert torch.equal(call(model, ids, other, do_sample=sample).sequences, plain)
    assert replays[0] > 5


def test_a_scripted_draft_runs_captured(replays):
    """The models of the benchmarks: what they write is known, and how often the draft is right."""
    model = make_counting(tiny_target(tie_word_embeddings=False, initializer_range=0.02, **SIZES)).cuda()
    ids = prompt(100, seed=1).cuda()
    expected = (int(ids[0, -1]) + 1 + torch.arange(60)) % 64
    draft = guessing_draft(model, None, ngram_branch_length=0, fallback_to_plain=False)
    assert isinstance(draft, GuessingDraft)
    for rate in (0.0, 1.0):
        draft.set_guesses(rate, 1, 4096)
        out = call(model, ids, draft)
        assert out.sequences[0, 100:].tolist() == expected.tolist()
        tau = out.speculation_stats.tau
        assert tau == 1.0 if rate == 0.0 else tau > 5
    assert replays[0] > 20
