"""The seam with transformers: what import changes, what it leaves, threads, other assistants, chains."""

import threading

import pytest
import torch
from models import ScriptedDraft, learned, prompt, scripted, tiny_target
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig
from transformers.generation import GenerationMixin
from transformers.pipelines import base as pipelines_base

import longspec_hf
from longspec_hf import with_tree_settings
from longspec_hf.hook import ATTENTION_NAME
from longspec_hf.tree import TokenTree

LOGIT_TOLERANCE = 1e-4  # fp32 logits of size 10, summed in another order


@pytest.fixture
def uninstalled():
    longspec_hf.uninstall()
    yield
    longspec_hf.install()


def test_uninstall_undoes_install(uninstalled):
    owned = [
        (GenerationMixin, "_assisted_decoding"),
        (GenerationMixin, "_get_candidate_generator"),
        (GenerationMixin, "_validate_generation_mode"),
        (pipelines_base, "load_assistant_model"),
    ]
    originals = [getattr(owner, name) for owner, name in owned]
    assert ATTENTION_NAME not in AttentionInterface() and ATTENTION_NAME not in AttentionMaskInterface()
    longspec_hf.install()
    longspec_hf.install()  # twice is once
    assert all(getattr(owner, name) is not old for (owner, name), old in zip(owned, originals, strict=True))
    longspec_hf.uninstall()
    assert all(getattr(owner, name) is old for (owner, name), old in zip(owned, originals, strict=True))


def test_other_assistants_reach_transformers(target):
    ids = prompt(10)
    plain = target.generate(ids, max_new_tokens=20, do_sample=False)
    assistant = tiny_target(seed=5)
    assert torch.equal(plain, target.generate(ids, max_new_tokens=20, do_sample=False, assistant_model=assistant))
    assert torch.equal(plain, target.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3))


def state(model):
    config = model.config.to_dict()
    return config, model.config._attn_implementation, dict(vars(model)).keys(), model.generation_config


def test_nothing_is_left_on_the_models(target):
    draft = scripted(target, prompt(10), 20, "noisy")
    before = [(repr(state(m)), [id(p) for p in m.parameters()], m.training) for m in (target, draft)]
    target.generate(prompt(10), max_new_tokens=20, do_sample=False, assistant_model=draft, num_assistant_tokens=2)
    assert before == [(repr(state(m)), [id(p) for p in m.parameters()], m.training) for m in (target, draft)]


def test_an_error_in_a_verification_restores_the_attention(target, monkeypatch):
    before = target.config._attn_implementation
    draft = scripted(target, prompt(10), 20, "noisy")
    seen = []

    def fails(*args, **kwargs):
        seen.append(target.config._attn_implementation)
        raise RuntimeError("out of memory")

    monkeypatch.setattr("longspec_hf.hook.tree_attention_forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        target.generate(prompt(10), max_new_tokens=20, do_sample=False, assistant_model=draft)
    assert seen == [ATTENTION_NAME]
    assert target.config._attn_implementation == before


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_threads_share_target_and_draft(attention):  # C21, promise 5
    model = tiny_target(attn_implementation=attention)
    draft = learned(model)
    prompts = [prompt(8 + 5 * i, seed=i) for i in range(4)]
    expected = [model.generate(ids, max_new_tokens=40, do_sample=False) for ids in prompts]
    got: dict = {}

    def run(i):
        speculative = model.generate(prompts[i], max_new_tokens=40, do_sample=False, assistant_model=draft)
        got[i] = speculative, model.generate(prompts[i], max_new_tokens=40, do_sample=False)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert torch.equal(got[i][0], expected[i]) and torch.equal(got[i][1], expected[i])
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("mode", ["oracle", "noisy", "wrong"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_target_that_takes_no_tree_runs_a_chain(mode, do_sample, monkeypatch):
    model = tiny_target()
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    ids = prompt(10)
    plain = model.generate(ids, max_new_tokens=30, do_sample=False)
    draft = ScriptedDraft(model, plain, mode, tree_shape=[1, 1, 1], ngram_branch_length=4)
    forwards = []
    original = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: forwards.append(1) or original(self, *a, **k))
    out = model.generate(ids, max_new_tokens=30, do_sample=do_sample, assistant_model=draft)
    assert out.shape == plain.shape
    if not do_sample:
        assert torch.equal(plain, out)
        # The prefill, then at best four tokens a forward.
        assert len(forwards) == {"oracle": 1 + 8, "noisy": len(forwards), "wrong": 30}[mode]
        assert mode != "noisy" or len(forwards) < 30


@pytest.mark.parametrize("name", ["speculated", "num_assistant_tokens", "generation_config"])
def test_depth_settings_of_a_call(target, name, monkeypatch):  # C44
    ids = prompt(10)
    draft = scripted(target, ids, 31, "oracle", tree_shape=[1] * 6)
    kwargs, depth = {
        "speculated": ({}, 6),
        "num_assistant_tokens": ({"num_assistant_tokens": 2}, 2),
        "generation_config": ({"generation_config": GenerationConfig(tree_shape=[1, 1, 1])}, 3),
    }[name]
    lengths = []
    original = type(target).forward
    monkeypatch.setattr(
        type(target),
        "forward",
        lambda self, *a, **k: lengths.append(k["input_ids"].shape[1]) or original(self, *a, **k),
    )
    out = target.generate(ids, max_new_tokens=30, do_sample=False, assistant_model=draft, **kwargs)
    assert max(lengths[1:]) == 1 + depth
    assert draft.config.tree_shape == [1] * 6
    assert torch.equal(out, draft.script[None, :40])


def test_the_drafts_own_settings_lie_between_call_and_config(target):
    ids = prompt(10)
    draft = scripted(target, ids, 31, "oracle", tree_shape=[1] * 6)
    draft.generation_config = GenerationConfig(tree_shape=[1] * 4)

    def deepest(**kwargs):
        out = target.generate(
            ids, max_new_tokens=30, do_sample=False, assistant_model=draft, return_dict_in_generate=True, **kwargs
        )
        return len(out.speculation_stats.accepted_per_depth)

    assert deepest() == 4
    assert deepest(generation_config=GenerationConfig(tree_shape=[1, 1])) == 2


def test_tree_settings_are_kept_where_a_generation_config_is_a_models_own(target):
    """`GenerationConfig(**fields)` drops them where the fields say `_from_model_config`."""
    ids = prompt(10)
    draft = scripted(target, ids, 31, "oracle", tree_shape=[1] * 6)
    own = GenerationConfig.from_model_config(target.config)
    assert own._from_model_config
    config = with_tree_settings(own, tree_shape=(1, 1), ngram_branch_length=0)
    config.update(max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    out = target.generate(ids, generation_config=config, assistant_model=draft)
    assert len(out.speculation_stats.accepted_per_depth) == 2
    assert torch.equal(out.sequences, draft.script[None, :40])
    assert not hasattr(own, "tree_shape") and config.tree_shape == [1, 1]
    assert with_tree_settings(own, tree_shape="auto").tree_shape == "auto"
    with pytest.raises(ValueError, match="tree_shape"):  # transformers takes no unknown argument
        target.generate(ids, max_new_tokens=3, tree_shape=[1, 1], assistant_model=draft)
    with pytest.raises(ValueError, match="`tree_depth` is no tree setting, expected one of tree_shape"):
        with_tree_settings(own, tree_depth=3)


@pytest.mark.parametrize(
    ("setting", "value"), [("tree_shape", [0]), ("max_tree_nodes", 0), ("ngram_branch_length", -2), ("tree_shape", 7)]
)
def test_bad_settings_of_a_call_are_refused_before_any_forward(target, setting, value, monkeypatch):  # C83
    draft = learned(target)
    monkeypatch.setattr(type(target), "forward", lambda *a, **k: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match=f"`{setting}`"):
        target.generate(
            prompt(5), max_new_tokens=3, assistant_model=draft, generation_config=GenerationConfig(**{setting: value})
        )


@pytest.mark.parametrize("shape", [[1], [4], [64], [200], []], ids=str)
def test_odd_tree_shapes_work(target, shape):  # C83
    ids = prompt(10)
    plain = target.generate(ids, max_new_tokens=20, do_sample=False)
    draft = learned(target, tree_shape=shape, max_tree_nodes=300)
    assert torch.equal(plain, target.generate(ids, max_new_tokens=20, do_sample=False, assistant_model=draft))


def verify(model, ids, tree):
    """The target's logits of a tree's nodes behind the text `ids`."""
    from longspec_hf.cache import LongSpecCache
    from longspec_hf.hook import CACHE_ARG, _Runner

    cache = LongSpecCache()
    with torch.no_grad():
        model(ids[:, :-1], use_cache=True, **{CACHE_ARG: cache})
        cache.begin_rounds(1)
        runner = _Runner(model, ids, GenerationConfig(), {}, cache, None)
        return runner.verify(tree, torch.tensor([[ids.shape[1] - 1]]))[0]


def random_tree(seed, root):
    """A random tree of 1-40 nodes in shuffled (but parent-first) order."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 41, (1,), generator=generator))
    parents = [0] + [int(torch.randint(0, i, (1,), generator=generator)) for i in range(1, count)]
    depths = [0] * count
    for i in range(1, count):
        depths[i] = depths[parents[i]] + 1
    tokens = torch.randint(0, 64, (1, count), generator=generator)
    tokens[0, 0] = root
    return TokenTree(tokens, torch.tensor([parents]), torch.tensor([depths]), torch.ones(1, count, dtype=torch.bool))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tree_logits_equal_those_of_the_paths(attention):  # C79, C80
    for family in ("llama", "mistral"):
        model = tiny_target(family, attn_implementation=attention)
        ids = prompt(17)
        for seed in range(25):
            tree = random_tree(seed, ids[0, -1])
            logits = verify(model, ids, tree)
            [(tokens, parents)] = tree.path_lists()
            for node in range(0, tree.num_nodes, 5):
                path, at = [], node
                while at:
                    path.append(tokens[at])
                    at = parents[at]
                text = torch.cat([ids, torch.tensor([path[::-1]], dtype=torch.long)], dim=1)
                with torch.no_grad():
                    expected = model(text).logits[0, -1]
                assert (logits[node] - expected).abs().max() < LOGIT_TOLERANCE, (family, seed, node)


def test_a_node_is_seen_by_its_descendants_only(target):  # C81
    ids = prompt(17)
    for seed in range(10):
        tree = random_tree(seed, ids[0, -1])
        changed = tree.num_nodes // 3
        tokens = tree.token_ids.clone()
        tokens[0, changed] = (tokens[0, changed] + 1) % 64
        other = TokenTree(tokens, tree.parents, tree.depths, tree.valid)
        differs = (verify(target, ids, tree) != verify(target, ids, other)).any(-1)
        bits = tree.ancestor_bits()[0, :, 0]
        descends = (bits >> changed & 1).bool()
        assert torch.equal(differs, descends)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"input_ids": prompt(6), "use_cache": False}, "use_cache"),
        ({"input_ids": prompt(6), "output_attentions": True}, "output_attentions"),
        ({"input_ids": prompt(6), "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}, "attention_mask"),
    ],
    ids=["no cache", "attentions", "holes"],
)
def test_what_is_not_speculated_is_decoded_plainly(target, kwargs, reason):
    plain = target.generate(**kwargs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    out = target.generate(
        **kwargs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, assistant_model=learned(target)
    )
    assert torch.equal(plain.sequences, out.sequences)
    assert reason in out.speculation_stats.fallback_reason
