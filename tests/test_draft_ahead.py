"""The next round's beam, drafted while the host looks at this one's tokens: when it is, and when it is dropped."""

import pytest
import torch
from engine_calls import after_prefill, call
from models import ScriptedDraft, learned, prompt, tiny_target
from transformers import GenerationConfig

from longspec_hf.engine import Engine, rounds
from longspec_hf.engine.host_copies import HostCopies
from longspec_hf.settings import resolve_tree_settings
from longspec_hf.text import TextBuffer
from longspec_hf.tree_choice import TreeChooser

pytestmark = pytest.mark.usefixtures("engine_on_cpu")


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_the_next_beam_is_drafted_while_the_host_looks_at_the_tokens(sample, monkeypatch):
    model = tiny_target(initializer_range=0.1)
    ids = prompt(40, seed=5)
    draft = learned(model, tree_shape=[2, 4], fallback_to_plain=False)
    order, fetch, propose, commit = [], HostCopies.fetch, Engine.propose, Engine.commit

    def fetched(self, source):
        read = fetch(self, source)
        order.append("fetch")
        return lambda: order.append("read") or read()

    monkeypatch.setattr(HostCopies, "fetch", fetched)
    monkeypatch.setattr(Engine, "propose", lambda *args: order.append("beam") or propose(*args))
    monkeypatch.setattr(Engine, "commit", lambda *args: order.append("commit") or commit(*args))
    outs = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(rounds, "DRAFTS_AHEAD", devices)
        order.clear()
        torch.manual_seed(1)
        outs.append(call(model, ids, draft, do_sample=sample))
        count = outs[-1].speculation_stats.rounds
        # One beam more than rounds: the last is drafted in vain.
        assert order.count("beam") == count + len(devices) and count > 5
        usual = ["commit", "beam"] if sample else ["fetch", "beam", "read"]
        assert (order == ["beam"] + usual * count) == bool(devices)
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    taus = [out.speculation_stats.accepted_per_depth for out in outs]
    assert taus[0] == taus[1]


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_a_window_shorter_than_a_path_leaves_no_room_for_a_beam_ahead(window, monkeypatch):
    """Behind it are the rows of one tree, and a round may fill them with what it commits: the next beam waits."""
    model = tiny_target(initializer_range=0.1)
    ids = prompt(3, seed=5)
    plain = call(model, ids).sequences
    ahead, draft_ahead = [], Engine._draft_ahead

    def watched(self, settings):
        draft_ahead(self, settings)
        ahead.append(self._ahead is not None)

    monkeypatch.setattr(Engine, "_draft_ahead", watched)
    tree = {"tree_shape": [2, 4, 4], "max_tree_nodes": 3, "ngram_branch_length": 0}
    draft = ScriptedDraft(model, plain, "oracle", sliding_window=window, fallback_to_plain=False, **tree)
    assert torch.equal(call(model, ids, draft).sequences, plain)
    assert set(ahead) == {window >= 3}


def test_greedy_rounds_leave_the_ids_on_the_host(monkeypatch):
    """A copy to the device would wait for the beam it drafts."""
    asked, ids_of = [0], TextBuffer.ids.fget

    def counted(self):
        asked[0] += 1
        return ids_of(self)

    monkeypatch.setattr(TextBuffer, "ids", property(counted))
    model = tiny_target(initializer_range=0.1)
    ids, counts = prompt(40, seed=5), []
    for new_tokens in (8, 40):
        asked[0] = 0
        call(model, ids, learned(model, fallback_to_plain=False), max_new_tokens=new_tokens)
        counts.append(asked[0])
    assert counts[0] == counts[1] > 0


def test_another_tree_has_a_beam_of_its_own(monkeypatch):
    """What was drafted ahead for the tree of before is dropped; so are the trees themselves the same."""
    model = tiny_target(initializer_range=0.1)
    ids = prompt(40, seed=5)
    draft = learned(model, tree_shape="auto", fallback_to_plain=False)
    draft.generation_config = GenerationConfig(max_tree_nodes=16)
    taus = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(rounds, "DRAFTS_AHEAD", devices)
        turn = iter(range(1000))

        def choose(self, *args, turn=turn):
            self.settings = list(self.trees)[next(turn) // 2 % len(self.trees)]
            return self.settings

        monkeypatch.setattr(TreeChooser, "choose", choose)
        stats = call(model, ids, draft).speculation_stats
        taus.append((stats.accepted_per_depth, stats.rounds, stats.rounds_by_tree))
    assert taus[0] == taus[1] and len(taus[0][2]) > 3


def test_a_state_loaded_again_has_a_beam_of_its_own():
    model = tiny_target(initializer_range=0.1)
    ids = prompt(40, seed=5)
    text = call(model, ids).sequences
    draft = ScriptedDraft(model, text, "oracle", ngram_branch_length=0)
    settings = resolve_tree_settings(draft, GenerationConfig()).of_tree(None)
    generator, cache = after_prefill(model, draft, ids, settings)
    with torch.no_grad():
        generator.append([[int(text[0, 40])]])
        engine = Engine(model, generator, cache)
        for _ in range(3):  # the first round drafts nothing ahead, where it is captured later
            engine.load([20], None)
            engine.prepare(settings, greedy=True)
            _, tokens = engine.greedy_round(settings)
            assert tokens[0] == text[0, 41 : 41 + len(tokens[0])].tolist() and len(tokens[0]) == 1 + settings.depth
            generator.window.advance([-len(tokens[0])])


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_the_chooser_sees_the_beam_of_the_round_and_not_the_next_one(sample, monkeypatch):
    model = tiny_target(initializer_range=0.1)
    ids = prompt(40, seed=5)
    draft = learned(model, tree_shape="auto", fallback_to_plain=False)
    draft.generation_config = GenerationConfig(max_tree_nodes=16)
    monkeypatch.setattr(TreeChooser, "looks", True)
    monkeypatch.setattr(TreeChooser, "choose", lambda self, *_: self.settings)
    add_round, seen = TreeChooser.add_round, []
    monkeypatch.setattr(
        TreeChooser,
        "add_round",
        lambda self, outcomes, *rest: seen.append(outcomes) or add_round(self, outcomes, *rest),
    )
    calls = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(rounds, "DRAFTS_AHEAD", devices)
        seen.clear()
        torch.manual_seed(1)
        call(model, ids, draft, do_sample=sample)
        calls.append(list(seen))
    assert calls[0] == calls[1]
    assert sum(len(outcomes) == 1 for outcomes in calls[0]) > 5
