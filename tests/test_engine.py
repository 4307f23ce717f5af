"""The engine's rounds, uncaptured on the CPU: the same tokens as plain decoding and as the other rounds."""

import dataclasses

import pytest
import torch
from engine_calls import after_prefill, call
from longspec_hf_kernels import greedy_walk
from models import ScriptedDraft, learned, prompt, tiny_target
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from longspec_hf.engine import Engine
from longspec_hf.pacing import ENGINE_CERTAIN, ENGINE_PATIENCE, Pacer
from longspec_hf.settings import resolve_tree_settings
from longspec_hf.tree import TokenTree
from longspec_hf.verification import walk

pytestmark = pytest.mark.usefixtures("engine_on_cpu")


@pytest.fixture
def engine_rounds(monkeypatch):
    """Counts the engine's rounds of either kind."""
    counts = {"greedy_round": 0, "draft_and_verify": 0}
    for name in counts:
        original = getattr(Engine, name)

        def counted(self, *args, _name=name, _original=original):
            counts[_name] += 1
            return _original(self, *args)

        monkeypatch.setattr(Engine, name, counted)
    return counts


@pytest.mark.parametrize("mode", ["oracle", "noisy", "wrong", "learned"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_equals_plain_and_the_other_rounds(mode, sample, engine_rounds):
    model = tiny_target(initializer_range=0.1)
    for length in (1, 40, 700) if mode == "learned" else (3, 300):
        ids = prompt(length, seed=length)
        torch.manual_seed(length)
        plain = call(model, ids, do_sample=sample).sequences
        draft = learned(model) if mode == "learned" else ScriptedDraft(model, plain, mode)
        outs = {}
        for captured in (True, False):
            draft.config.capture_rounds = captured
            before = sum(engine_rounds.values())
            torch.manual_seed(length)
            outs[captured] = call(model, ids, draft, do_sample=sample)
            assert torch.equal(outs[captured].sequences, plain)
            used = sum(engine_rounds.values()) - before
            assert used == (outs[captured].speculation_stats.rounds if captured else 0)
        assert outs[True].speculation_stats.uncaptured_reason is None
        assert outs[False].speculation_stats.uncaptured_reason == "`capture_rounds` is off"
        other = {"decode_seconds": 0, "prefill_seconds": 0, "uncaptured_reason": None}
        assert len({repr(dataclasses.replace(out.speculation_stats, **other)) for out in outs.values()}) == 1


def wide_layers(cls, config_cls, **fields):
    torch.manual_seed(0)
    config = config_cls(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
        max_position_embeddings=2048,
        **fields,
    )
    model = cls(config).eval()
    with torch.no_grad():  # norms and biases that are not the identity
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "model",
    [
        lambda: wide_layers(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True),
        lambda: wide_layers(Qwen3ForCausalLM, Qwen3Config),
        lambda: tiny_target(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        ),
    ],
    ids=["qwen2", "qwen3", "llama3-rope"],
)
def test_biases_norms_per_head_and_scaled_tables(model, engine_rounds):
    model = model()
    for seed in range(2):
        ids = prompt(30, seed=seed)
        plain = call(model, ids).sequences
        for draft in (learned(model, tree_shape=[2, 4]), ScriptedDraft(model, plain, "noisy")):
            out = call(model, ids, draft)
            assert torch.equal(out.sequences, plain)
    assert engine_rounds["greedy_round"] > 20


def test_rows_of_a_batch_end_and_leave_the_state(engine_rounds):
    model = tiny_target(initializer_range=0.1)
    lengths = (5, 40, 300)
    rows = [prompt(length, seed=length) for length in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (300 - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (300 - n) + [1] * n for n in lengths])
    plain = call(model, ids, attention_mask=mask).sequences
    end = int(plain[1, 300 + 12])
    kwargs = {"attention_mask": mask, "eos_token_id": end, "pad_token_id": 0}
    plain = call(model, ids, **kwargs).sequences
    out = call(model, ids, ScriptedDraft(model, plain, "noisy"), **kwargs)
    assert torch.equal(out.sequences, plain)
    assert engine_rounds["greedy_round"] == out.speculation_stats.rounds


@pytest.mark.parametrize("branch", [8, 40], ids=["short", "longer than the window"])
def test_the_window_moves_and_the_buffers_grow(branch, engine_rounds, monkeypatch):
    monkeypatch.setattr("longspec_hf.cache_layer.GROWTH_ROWS", 64)
    monkeypatch.setattr("longspec_hf.hook.GROWTH_ROWS", 64)
    model = tiny_target(initializer_range=0.1)
    ids = prompt(50 if branch < 16 else 4, seed=3)
    plain = call(model, ids, max_new_tokens=200).sequences
    draft = ScriptedDraft(model, plain, "noisy", sliding_window=16)
    draft.generation_config = GenerationConfig(ngram_branch_length=branch, max_tree_nodes=64)
    moves = []
    original = Engine.prepare

    def watched(self, *args):
        before = self.generator.window.row_lengths[0], self._addresses
        original(self, *args)
        moves.append((before[0] > self.generator.window.row_lengths[0], before[1] != self._addresses))

    monkeypatch.setattr(Engine, "prepare", watched)
    assert torch.equal(call(model, ids, draft, max_new_tokens=200).sequences, plain)
    assert sum(moved for moved, _ in moves) > 5
    assert sum(grown for _, grown in moves) > 1


def test_plain_steps_keep_the_draft_ready(engine_rounds, monkeypatch):
    """A call that goes over to plain steps and back drafts as one that never did."""
    model = tiny_target(initializer_range=0.1)
    ids = prompt(40, seed=5)
    plain = call(model, ids).sequences
    turns = iter([True, False, False, True, False] + [True] * 60)
    monkeypatch.setattr("longspec_hf.pacing.Pacer.speculates", lambda self: next(turns))
    draft = learned(model)
    out = call(model, ids, draft)
    assert torch.equal(out.sequences, plain)
    assert out.speculation_stats.plain_steps == 3
    windows = []
    for captured in (True, False):
        draft.config.capture_rounds = captured
        turns = iter([True, False, False, True, False] + [True] * 60)
        cache = call(model, ids, draft)
        windows.append((cache.speculation_stats.accepted_per_depth, cache.speculation_stats.rounds))
    assert windows[0] == windows[1]


@pytest.mark.parametrize("offset", range(6))
def test_a_stop_inside_a_block_ends_the_text_there(offset):
    model = tiny_target(initializer_range=0.1)
    ids = prompt(20, seed=8)
    plain = call(model, ids).sequences
    end = int(plain[0, 20 + offset])
    kwargs = {"eos_token_id": end, "pad_token_id": 0}
    expected = call(model, ids, **kwargs).sequences
    draft = ScriptedDraft(model, plain, "oracle")
    assert torch.equal(call(model, ids, draft, **kwargs).sequences, expected)
    for new_tokens in range(1, 8):
        assert torch.equal(call(model, ids, draft, max_new_tokens=new_tokens).sequences, plain[:, : 20 + new_tokens])


def test_a_chat_turn_goes_on_from_the_engines_cache():
    model = tiny_target(initializer_range=0.1)
    ids = prompt(30, seed=9)
    first = call(model, ids, learned(model), max_new_tokens=20)
    cache = getattr(first, "cache", None) or first.past_key_values
    longer = torch.cat([first.sequences, prompt(7, seed=10)], dim=1)
    name = "cache" if "cache" in first else "past_key_values"
    out = call(model, longer, learned(model), **{name: cache})
    assert torch.equal(out.sequences, call(model, longer).sequences)


@pytest.mark.parametrize("changes_hidden", [False, True])
@pytest.mark.parametrize("shape", [[3], [3, 4, 4], [2, 4, 8, 8]])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_trees_are_those_of_the_other_rounds(temperature, shape, changes_hidden):
    """The same tokens, parents and scores: ancestors, windows and positions are what they are there.

    A draft may also change what the layer gives before it reaches the head.
    """
    model = wide_layers(Qwen2ForCausalLM, Qwen2Config)
    ids = prompt(60, seed=4)
    # A sharp draft, for which it matters what a node has seen.
    draft = learned(model, tree_shape=shape, max_tree_nodes=24, ngram_branch_length=0, sliding_window=16)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    if changes_hidden:
        offset = 20 * torch.randn(draft.config.hidden_size, generator=torch.Generator().manual_seed(6))
        draft.next_token_logits = lambda hidden, head, *_: head(hidden + offset)
    call_config = GenerationConfig(do_sample=True, temperature=temperature)
    settings = resolve_tree_settings(draft, call_config)
    assert settings.beam_temperature == temperature
    generator, cache = after_prefill(model, draft, ids, settings)
    with torch.no_grad():
        for token in (7, 9, 11):
            generator.append([[token]])
            theirs = generator.propose(cache, [20], static_shape=True)
            engine = Engine(model, generator, cache)
            engine.load([20], None)
            ours = engine.draft(settings).tree
            for name in ("token_ids", "parents", "depths", "valid"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), (token, name)


@pytest.mark.parametrize(("sequences", "sample"), [(1, False), (1, True), (2, False)])
def test_only_greedy_rounds_of_one_sequence_may_go_untimed(sequences, sample, monkeypatch):
    made = []
    monkeypatch.setattr("longspec_hf.decoding.Pacer", lambda *args: made.append(Pacer(*args)) or made[-1])
    model = tiny_target(initializer_range=0.1)
    call(model, prompt(20, seed=1).expand(sequences, -1), learned(model), do_sample=sample, max_new_tokens=8)
    assert made[-1].patience == ENGINE_PATIENCE
    assert made[-1].certain == (ENGINE_CERTAIN if (sequences, sample) == (1, False) else float("inf"))


def test_what_rounds_cost_is_known_to_the_next_call_of_the_kind(monkeypatch):
    """So it need not capture a plain step to compare them with."""
    known = []
    monkeypatch.setattr("longspec_hf.decoding.Pacer", lambda *args: known.extend(args[3:]) or Pacer(*args))
    model = tiny_target(initializer_range=0.1)
    ids, options = prompt(20, seed=1), {"max_new_tokens": 60}
    draft = ScriptedDraft(model, call(model, ids, **options).sequences, "noisy", fallback_to_plain=True)
    first, second = (call(model, ids, draft, **options) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences) and first.speculation_stats.plain_steps >= 2
    assert known[0] == {} and known[1] and all(tree.depth and cost > 0 for tree, cost in known[1].items())
    call(model, ids, draft, do_sample=True, **options)
    call(model, ids, learned(model), **options)
    call(model, torch.cat([ids] * 4, dim=1), draft, **options)
    assert known[2:] == [{}, {}, {}]


def test_near_ties_that_are_rechecked_are_not_the_engines(engine_rounds):
    model = tiny_target(initializer_range=0.1)
    ids = prompt(20, seed=1)
    out = call(model, ids, learned(model, recheck_near_ties=True))
    assert engine_rounds["greedy_round"] == 0
    assert out.speculation_stats.uncaptured_reason.startswith("`recheck_near_ties`")


def test_the_walk_on_the_device_is_the_walk_on_the_host():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        nodes = int(torch.randint(1, 12, (1,), generator=generator))
        parents, ids = [0], [9]
        for node in range(1, nodes):
            parent = int(torch.randint(node, (1,), generator=generator))
            free = {0, 1, 2, 3} - {ids[i] for i in range(1, node) if parents[i] == parent}
            if not free:
                break
            parents.append(parent)
            ids.append(free.pop())
        count = len(ids)
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        unused = [0] * (12 - count)
        tree = TokenTree(
            *(torch.tensor([row + unused]) for row in (ids, parents, depths)),
            torch.tensor([[True] * count + [False] * len(unused)]),
        )
        logits = torch.randn(1, 12, 4, generator=generator)
        best = logits.argmax(-1)
        result = walk(ids, parents, lambda node, best=best: (int(best[0, node]), False))
        visited, report = greedy_walk(tree.token_ids, tree.parents, tree.valid, logits, 12)
        drafted, used, *tokens = report[0].tolist()
        assert drafted == count - 1
        assert visited[0].tolist() == result.visited + [0] * (12 - used)
        assert tokens == result.tokens + [0] * (12 - used)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda model: model.register_forward_hook(lambda *_: None), "hooks of its own"),
        (lambda model: setattr(model.model.layers[0], "forward", model.model.layers[0].forward), "hooks of its own"),
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "silu"),
        (lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.GELU()), "silu"),
        (lambda model: setattr(model.model.layers[1], "input_layernorm", torch.nn.RMSNorm(32)), "holds a RMSNorm"),
        (lambda model: setattr(model.model, "norm", torch.nn.Identity()), "holds a Identity"),
    ],
)
def test_targets_that_are_not_as_written_out_are_left_to_transformers(change, word, engine_rounds):
    model = tiny_target(initializer_range=0.1)
    ids = prompt(20, seed=1)
    change(model)
    plain = call(model, ids).sequences
    out = call(model, ids, ScriptedDraft(model, plain, "noisy"))
    assert torch.equal(out.sequences, plain)
    assert engine_rounds["greedy_round"] == 0
    assert word in out.speculation_stats.uncaptured_reason


@pytest.mark.parametrize("before", [False, True], ids=["hook", "pre-hook"])
def test_hooks_of_all_modules_are_left_to_transformers(before, engine_rounds):
    def changed(module, args, output=None):
        if type(module).__name__ != "LlamaMLP":
            return None
        return (1.3 * args[0],) if before else 1.3 * output

    model = tiny_target(initializer_range=0.1)
    ids = prompt(20, seed=1)
    modules = torch.nn.modules.module
    unchanged = call(model, ids).sequences
    register = modules.register_module_forward_pre_hook if before else modules.register_module_forward_hook
    hook = register(changed)
    try:
        plain = call(model, ids).sequences
        out = call(model, ids, ScriptedDraft(model, plain, "noisy"))
    finally:
        hook.remove()
    assert torch.equal(out.sequences, plain) and not torch.equal(plain, unchanged)
    assert engine_rounds["greedy_round"] == 0
    assert out.speculation_stats.uncaptured_reason == "a hook is registered for all modules"
    assert call(model, ids, learned(model)).speculation_stats.uncaptured_reason is None
