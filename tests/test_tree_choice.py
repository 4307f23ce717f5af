"""`tree_shape="auto"`: the tree of most tokens a second is chosen, and the text is the same."""

import gc
import random
import weakref

import pytest
import torch
from models import ScriptedDraft, learned, prompt, tiny_target
from transformers import GenerationConfig

from longspec_hf import LongSpecDraftConfig, LongSpecDraftModel, hook
from longspec_hf.acceptance import Outcome, Promise
from longspec_hf.engine import Engine, support
from longspec_hf.round_cost import CPU, GPU, PairTimes, RoundCost, UsualCosts
from longspec_hf.settings import resolve_tree_settings
from longspec_hf.tree_choice import TreeChooser

AUTO = {"tree_shape": "auto", "ngram_branch_length": 8}
STEP = 0.01


def settings_on(device="cpu", given=None, **fields):
    with torch.device(device):
        draft = LongSpecDraftModel(LongSpecDraftConfig.from_target(tiny_target().config, **fields))
    return resolve_tree_settings(draft, GenerationConfig(**given or {}))


class Text:
    """Rounds over a text of known difficulty, timed by a clock of its own.

    Args:
        chances: per size, that a beam node of it is right, given its parent.
        usual: what rounds take, in steps of `STEP` seconds.
    """

    def __init__(self, chances, usual, captured=False, seed=0):
        self.chances, self.usual, self.captured, self.random = chances, usual, captured, random.Random(seed)

    def sizes(self, tree):
        found = []
        for _ in tree.shape:
            luck = self.random.random()
            needed = next((i for i, chance in enumerate(self.chances) if luck < chance), None)
            if needed is None or max([needed, *found]) > tree.size:
                break
            found.append(max([needed, *found]))
        return tuple(found)

    def nodes(self, tree):
        """Of a tree without a branch; a captured one has all its nodes."""
        return tree.nodes if self.captured else min(tree.nodes, 1 + sum(tree.shape))

    def seconds(self, tree):
        return STEP * sum(self.usual.parts(self.nodes(tree), tree.shape, 1))

    def best(self, trees):
        """The tree of most tokens a second, by what a great many rounds give."""

        def speed(tree):
            rounds = [len(self.sizes(tree)) + 1 for _ in range(1500)]
            return sum(rounds) / len(rounds) / self.seconds(tree)

        return max(trees, key=speed), {tree: speed(tree) for tree in trees}

    def decode(self, chooser, rounds, left=10**6):
        for _ in range(rounds):
            tree = chooser.trees[chooser.choose(left)]
            outcome = Outcome(self.sizes(tree), 0, False, 0)
            chooser.add_round([outcome], self.nodes(tree), 1, self.seconds(tree))
        return chooser.trees[chooser.settings]


CHANCES = {
    "always right": [1.0, 1.0, 1.0, 1.0, 1.0],
    "good": [0.7, 0.8, 0.85, 0.88, 0.9],
    "middling": [0.45, 0.6, 0.68, 0.73, 0.78],
    "poor": [0.1, 0.15, 0.2, 0.22, 0.25],
    "always wrong": [0.0] * 5,
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CHANCES)
@pytest.mark.parametrize("slower", [1.0, 3.0], ids=["usual", "dear nodes"])
def test_the_best_tree_is_found(device, name, slower):
    """Within an eighth of the best fixed tree's speed, without being told what rounds really take."""
    known, captured = (CPU, False) if device == "cpu" else (GPU, True)
    usual = UsualCosts([(rows, slower * cost) for rows, cost in known.rows], known.level)
    text = Text(CHANCES[name], usual, captured)
    chooser = TreeChooser(settings_on(device), RoundCost(known), captured)
    chooser.add_setup(0.0)
    _, speeds = text.best(chooser.trees.values())
    for _ in range(2):
        chooser.add_plain(1, STEP)
    text.decode(chooser, 100)
    reached = [speeds[text.decode(chooser, 4)] for _ in range(100)]
    assert sum(reached) / len(reached) > 0.87 * max(speeds.values())


@pytest.mark.parametrize("captured", [False, True])
def test_what_is_given_decides(captured):
    """Costs known and shares known: the maximiser of tokens over seconds, whichever it is."""
    for device in ("cpu", "meta"):
        chooser = TreeChooser(settings_on(device), RoundCost(CPU), captured)
        chooser.add_setup(0.0)
        for target in chooser.trees.values():
            shares = [[0.0] * len(chooser.sizes) for _ in range(8)]
            for level in range(len(target.shape)):
                for size in range(target.size, len(chooser.sizes)):
                    shares[level][size] = 1.0
            copied = [1.0] * target.branch if not target.shape else [0.0] * 8
            promise = Promise(shares, copied)
            speeds = {
                tree: promise.tokens(len(tree.shape), tree.size, tree.branch)
                / chooser.cost.seconds(
                    min(tree.nodes, 1 + sum(tree.shape) + (1.0 if captured else 0.5) * tree.branch), tree.shape
                )
                for tree in chooser.trees.values()
            }
            chooser.acceptance.promise = lambda promise=promise: promise
            chooser._rounds = 16
            current = speeds[chooser.trees[chooser.settings]]
            chosen = speeds[chooser.trees[chooser.choose(10**6)]]
            assert chosen == max(speeds.values()) or (current * 1.05 >= max(speeds.values()) and chosen == current)


def test_a_small_promise_changes_nothing_and_a_capture_must_pay():
    chooser = TreeChooser(settings_on("meta"), RoundCost(GPU), captured=True)
    text = Text(CHANCES["always right"], GPU, captured=True)
    home = chooser.settings
    text.decode(chooser, 40)
    assert chooser.settings == home, "what a capture takes is not known yet"
    chooser.add_setup(5.0)
    text.decode(chooser, 40, left=200)
    assert chooser.settings == home, "200 tokens take less than a second"
    text.decode(chooser, 40, left=100_000)
    assert len(chooser.settings.tree_shape) > 5


@pytest.mark.parametrize("captured", [False, True])
def test_when_another_tree_is_taken(captured, monkeypatch):
    """At every fourth or sixteenth round, and for more than a twentieth."""
    chooser = TreeChooser(settings_on(), RoundCost(CPU), captured)
    chooser.add_setup(0.0)
    first, other = chooser.settings, chooser.settings.of_tree(next(iter(chooser.trees.values())))
    gain = 1.04
    monkeypatch.setattr(chooser, "_seconds_a_token", lambda sequences: {first: gain, other: 1.0})
    patience = 16 if captured else 4
    for done in range(3 * patience):
        assert chooser.choose(1000) == first, done
        chooser.add_round([], 8, 1, None)
        if done == 2 * patience:
            gain = 1.06
    assert chooser.choose(1000) == other


def test_a_tree_is_kept_for_some_rounds():
    chooser = TreeChooser(settings_on(), RoundCost(CPU))
    text = Text(CHANCES["always wrong"], CPU)
    seen = []
    for _ in range(12):
        text.decode(chooser, 1)
        seen.append(chooser.settings)
    assert len(set(seen[:4])) == 1 and seen[0] == settings_on().of_tree(None)
    assert all(seen[i] == seen[i + 1] for i in range(11) if (i + 1) % 4)
    assert len(set(seen)) > 1


def recorded(target, draft, ids, new_tokens=120, **kwargs):
    kwargs = {"do_sample": False, **kwargs}
    return target.generate(
        ids, max_new_tokens=new_tokens, assistant_model=draft, return_dict_in_generate=True, **kwargs
    )


@pytest.fixture
def clock(monkeypatch):
    """Makes rounds take what the look-up for a CPU says, whatever this machine is busy with."""
    original = TreeChooser.add_round

    def add_round(self, outcomes, nodes, sequences, seconds):
        if not self.fixed:
            seconds = STEP * sum(CPU.parts(nodes, self.settings.tree_shape, sequences))
        original(self, outcomes, nodes, sequences, seconds)

    monkeypatch.setattr(TreeChooser, "add_round", add_round)


def test_an_always_right_draft_comes_to_deep_trees_and_an_always_wrong_one_to_small_ones(target, clock):
    ids = prompt(40)
    plain = target.generate(ids, max_new_tokens=120, do_sample=False)
    out = recorded(target, ScriptedDraft(target, plain, "oracle", **AUTO), ids)
    assert torch.equal(out.sequences, plain)
    assert max(name.split(",")[0].count("-") for name in out.speculation_stats.rounds_by_tree) >= 5
    wrong = ScriptedDraft(target, plain, "wrong", **AUTO | {"ngram_branch_length": 0})
    out = recorded(target, wrong, ids)
    assert torch.equal(out.sequences, plain)
    trees = out.speculation_stats.rounds_by_tree
    nodes = {name: int(name.split(", ")[1].split()[0]) for name in trees}
    assert nodes[max(trees, key=trees.__getitem__)] == 4, trees
    assert sum(trees.values()) == out.speculation_stats.rounds


@pytest.mark.parametrize("mode", ["oracle", "noisy", "wrong", "learned"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_the_text_is_plain_decodings(mode, sample, clock):
    model = tiny_target(initializer_range=0.1)
    ids = prompt(30, seed=1)
    torch.manual_seed(1)
    plain = model.generate(ids, max_new_tokens=70, do_sample=sample)
    draft = learned(model, **AUTO) if mode == "learned" else ScriptedDraft(model, plain, mode, **AUTO)
    torch.manual_seed(1)
    out = recorded(model, draft, ids, 70, do_sample=sample)
    assert torch.equal(out.sequences, plain)
    assert len(out.speculation_stats.rounds_by_tree) > 1 or mode == "noisy"


@pytest.mark.parametrize("engine", [False, True], ids=["forward", "engine"])
def test_the_text_is_plain_decodings_when_trees_change_all_the_time(target, engine, monkeypatch):
    """Any tree may follow any other: rows of a batch, padding, ends, the draft's window and the engine's state."""
    if engine:
        monkeypatch.setattr(support, "ENGINE_DEVICES", support.ENGINE_DEVICES | {"cpu"})
    used = []
    original = Engine.beams
    monkeypatch.setattr(Engine, "beams", lambda self, settings: used.append(True) or original(self, settings))
    chance = random.Random(0)
    monkeypatch.setattr(
        TreeChooser,
        "choose",
        lambda self, left, sequences: setattr(self, "settings", chance.choice(list(self.trees))) or self.settings,
    )
    ids = torch.cat([prompt(40), prompt(40, seed=1), prompt(40, seed=2)])
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    kwargs = {"attention_mask": mask, "pad_token_id": 0}
    plain = target.generate(ids, max_new_tokens=50, do_sample=False, **kwargs)
    for sequences, draft in ((3, learned(target, **AUTO)), (1, ScriptedDraft(target, plain[:1], "noisy", **AUTO))):
        end = {"eos_token_id": int(plain[2, 40 + 23])} if sequences == 3 else {}
        given = {**kwargs, **end, "attention_mask": mask[:sequences]}
        for sample in (False, True) if sequences == 1 else (False,):
            torch.manual_seed(0)
            expected = target.generate(ids[:sequences], max_new_tokens=50, do_sample=sample, **given)
            torch.manual_seed(0)
            out = recorded(target, draft, ids[:sequences], 50, do_sample=sample, **given)
            assert torch.equal(out.sequences, expected)
            assert len(out.speculation_stats.rounds_by_tree) > 5
            assert bool(used) == engine


def test_shapes_of_the_user_are_used_for_every_round(target):
    ids = prompt(40)
    plain = target.generate(ids, max_new_tokens=60, do_sample=False)
    for shape in ([2, 2], [4, 16, 16, 16, 16]):
        out = recorded(target, ScriptedDraft(target, plain, "noisy", tree_shape=shape), ids, 60)
        assert list(out.speculation_stats.rounds_by_tree.values()) == [out.speculation_stats.rounds]
        assert next(iter(out.speculation_stats.rounds_by_tree)).startswith("-".join(map(str, shape)) + ",")


def test_a_compiled_target_and_processes_keep_one_tree(target, clock, monkeypatch):
    ids = prompt(40)
    plain = target.generate(ids, max_new_tokens=80, do_sample=False)
    monkeypatch.setattr(hook, "is_compiled", lambda target: True)
    out = recorded(target, ScriptedDraft(target, plain, "wrong", **AUTO), ids, 80)
    assert torch.equal(out.sequences, plain)
    assert list(out.speculation_stats.rounds_by_tree) == ["4-4-4, 8 nodes"]


def test_rounds_that_the_end_cuts_short_say_nothing(target, monkeypatch):
    noted = []
    original = TreeChooser.add_round
    monkeypatch.setattr(
        TreeChooser, "add_round", lambda self, *args: noted.append(bool(args[0])) or original(self, *args)
    )
    ids = prompt(40)
    plain = target.generate(ids, max_new_tokens=14, do_sample=False)
    draft = ScriptedDraft(target, plain, "oracle", **AUTO)
    for new_tokens, expected in (
        (14, [True, True, True, False]),
        (13, [True, True, False]),
        (12, [True, True, False]),
    ):
        noted.clear()
        recorded(target, draft, ids, new_tokens)
        assert noted == expected, new_tokens  # the first token is the prefill's, a round gives four
    noted.clear()
    end = plain[0, 40:].tolist()
    place = next(i for i in range(5, 12) if end[i] not in end[:i])
    recorded(target, draft, ids, 14, eos_token_id=end[place], pad_token_id=0)
    assert noted == [True] * ((place - 1) // 4) + [False]


def test_times_are_remembered_per_pair_and_die_with_it():
    target, ids = tiny_target(), prompt(30)
    draft = learned(target, **AUTO)
    kinds = []
    original = PairTimes.recall

    def recall(self, kind):
        kinds.append((kind, original(self, kind)))
        return kinds[-1][1]

    PairTimes.recall, before = recall, original
    try:
        for _ in range(2):
            recorded(target, draft, ids, 20)
        recorded(target, learned(target, seed=2, **AUTO), ids, 20)
        recorded(target, draft, torch.cat([ids, ids]), 20)
    finally:
        PairTimes.recall = before
    assert [known is None for _, known in kinds] == [True, False, True, True]
    assert kinds[0][0] == kinds[1][0] != kinds[3][0]
    assert kinds[1][1].weight > 1
    dead = [weakref.ref(target), weakref.ref(draft)]
    del target, draft
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
