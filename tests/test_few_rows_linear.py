"""Linear layers over a few rows: the same numbers, nothing left behind, weights read at every call."""

import copy
import threading

import pytest
import torch
from models import ScriptedDraft, learned, prompt, tiny_target
from torch import nn
from torch.nn import functional as F

from longspec_hf import few_rows_linear as module
from longspec_hf.few_rows_linear import few_rows_linear, few_rows_view, linear

FP32_TOLERANCE = 1e-5  # sums of up to 96 products of size 1, in another order
pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="few_rows_linear needs PyTorch with MKL")


@pytest.fixture
def calls(monkeypatch):
    """Rows of every call that went through `few_rows_linear`."""
    rows = []

    def counted(x, weight, bias=None):
        rows.append(x.numel() // x.shape[-1])
        return few_rows_linear(x, weight, bias)

    monkeypatch.setattr(module, "few_rows_linear", counted)
    return rows


def tensors(rows, dtype=torch.float32):
    torch.manual_seed(rows)
    return torch.randn(1, rows, 96, dtype=dtype), torch.randn(40, 96, dtype=dtype), torch.randn(40, dtype=dtype)


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8, 13, 16, 17, 32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_f_linear(rows, with_bias, calls):
    x, weight, bias = tensors(rows)
    bias = bias if with_bias else None
    expected = F.linear(x, weight, bias)
    with torch.no_grad():
        out = linear(x, weight, bias)
    assert calls == [rows]
    assert out.shape == expected.shape and out.is_contiguous()
    assert (out - expected).abs().max() < FP32_TOLERANCE * weight.shape[1]


def test_strided_inputs(calls):
    x, weight, _ = tensors(6)
    expected = F.linear(x, weight)
    apart = torch.stack([x, x], dim=-1)[..., 0]  # every second number
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        for given in (apart, transposed):
            assert not given.is_contiguous()
            assert (linear(given, weight) - expected).abs().max() < FP32_TOLERANCE * weight.shape[1]
        two = linear(x.view(2, 3, 96), weight)  # a batch of two
    assert (two.view(1, 6, 40) - expected).abs().max() < FP32_TOLERANCE * weight.shape[1]
    assert calls == [6, 6, 6]


@pytest.mark.parametrize(
    "case", ["one row", "no row", "many rows", "fp64", "bf16", "training", "autocast", "subclass", "weight by columns"]
)
def test_everything_else_is_f_linear(case, calls):
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(case, torch.float32)
    rows = {"one row": 1, "no row": 0, "many rows": module.MOST_ROWS + 1}.get(case, 4)
    x, weight, bias = tensors(rows, dtype)
    if case == "subclass":
        weight = weight.as_subclass(type("Quantised", (torch.Tensor,), {}))
    if case == "weight by columns":
        weight = weight.t().contiguous().t()
    with torch.set_grad_enabled(case == "training"), torch.autocast("cpu", enabled=case == "autocast"):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert calls == []


def test_a_view_shares_all_tensors_and_what_has_no_parameters():
    target = tiny_target("qwen2")
    view = few_rows_view(target)
    assert type(view) is type(target) and view.config is target.config
    parameters = dict(target.named_parameters())
    assert {name: id(p) for name, p in view.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert view.model.rotary_emb is target.model.rotary_emb
    assert view.model.norm is not target.model.norm and view.model.norm.weight is target.model.norm.weight
    linears = [m for m in target.modules() if isinstance(m, nn.Linear)]
    of_view = [m for m in view.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == len(of_view) > 0
    assert all(type(m) is nn.Linear for m in linears) and not any(type(m) is nn.Linear for m in of_view)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_view_computes_what_its_model_computes(family, tied, calls):
    target = tiny_target(family, tie_word_embeddings=tied)
    ids = prompt(7)
    with torch.no_grad():
        expected, out = target(ids).logits, few_rows_view(target)(ids).logits
    assert set(calls) == {7}
    assert len(calls) == sum(isinstance(m, nn.Linear) for m in target.modules())
    assert (out - expected).abs().max() < 1e-4  # logits of size 10


def test_hooks_that_a_forward_installs_stay_on_the_view():
    target = tiny_target(output_hidden_states=True)
    before = [len(m._forward_hooks) for m in target.modules()]
    with torch.no_grad():
        out = few_rows_view(target)(prompt(5))
        assert len(out.hidden_states) == 3
        assert [len(m._forward_hooks) for m in target.modules()] == before
        assert len(target(prompt(5)).hidden_states) == 3


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_hooks_on_routers_stay_on_the_view(family):
    """They have a weight but no linear layer."""
    target, ids = tiny_target(family), prompt(5)
    before = [len(m._forward_hooks) for m in target.modules()]
    view = few_rows_view(target)  # before the target's own first such forward, as in a call
    with torch.no_grad():
        expected = target(ids, output_hidden_states=True, output_router_logits=True)
        hooked = [len(m._forward_hooks) for m in target.modules()]
        out = view(ids, output_hidden_states=True, output_router_logits=True)
        assert hooked == [len(m._forward_hooks) for m in target.modules()] != before
        assert len(out.router_logits) == len(expected.router_logits) == 2
        again = target(ids, output_router_logits=True)
    for ours, theirs in zip(out.router_logits + again.router_logits, 2 * expected.router_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripted_and_parametrised_modules_in_a_view():
    norm = torch.jit.script(nn.LayerNorm(8))
    model = nn.Sequential(nn.Linear(8, 8), norm, nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    view = few_rows_view(model)
    assert view[1] is norm
    with torch.no_grad():
        x = torch.randn(4, 8)
        torch.testing.assert_close(view(x), model(x), atol=1e-5, rtol=1e-5)


def test_hooks_of_the_model_run_in_the_view():
    target, seen = tiny_target(), []
    target.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    with torch.no_grad():
        few_rows_view(target)(prompt(5))
    assert seen == [(1, 5, 64)]


def test_a_layer_with_its_own_forward_keeps_it(calls):
    target = tiny_target()
    layer = target.model.layers[0].mlp.up_proj
    layer.forward = lambda x: F.linear(x, layer.weight) * 0 + 1  # as offloading replaces it
    with torch.no_grad():
        expected, out = target(prompt(5)).logits, few_rows_view(target)(prompt(5)).logits
    assert (out - expected).abs().max() < 1e-4
    assert len(calls) == sum(isinstance(m, nn.Linear) for m in target.modules()) - 1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("mode", ["oracle", "noisy", "wrong"])
@pytest.mark.parametrize("switched_on", [True, False])
def test_generates_the_same_ids(family, mode, switched_on, calls, monkeypatch):
    if not switched_on:
        monkeypatch.setattr(module, "MOST_ROWS", 0)
    target = tiny_target(family)
    ids = prompt(40)
    plain = target.generate(ids, max_new_tokens=24, do_sample=False)
    draft = ScriptedDraft(target, plain, mode)
    assert torch.equal(plain, target.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=draft))
    assert bool(calls) == switched_on


def test_the_draft_goes_through_it_too(target, calls):
    draft = learned(target, tree_shape=[5, 5], ngram_branch_length=0, max_tree_nodes=40)
    target.generate(prompt(40), max_new_tokens=10, do_sample=False, assistant_model=draft)
    assert 5 in calls and 11 in calls  # levels of the beam, trees


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "new parameter"])
def test_changed_weights_are_noticed(change):
    target, other = tiny_target(), tiny_target(seed=3)
    draft, ids = learned(target), prompt(40)

    def speculative():
        return target.generate(ids, max_new_tokens=30, do_sample=False, assistant_model=draft)

    first = speculative()
    with torch.no_grad():
        if change == "in place":  # as merging an adapter does
            for p, q in zip(target.parameters(), other.parameters(), strict=True):
                p.add_(q - p)
        elif change == "load_state_dict":
            target.load_state_dict(other.state_dict())
        else:
            target.lm_head.weight = nn.Parameter(target.lm_head.weight.roll(1, 0))
    plain = target.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(plain, speculative())
    assert not torch.equal(plain, first)


def test_an_error_leaves_both_models_as_they_were(target, monkeypatch):
    draft = learned(target)
    before = [[(n, type(m), id(m), set(vars(m))) for n, m in model.named_modules()] for model in (target, draft)]

    def fails(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(module, "few_rows_linear", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            target.generate(prompt(40), max_new_tokens=10, do_sample=False, assistant_model=draft)
    assert before == [
        [(n, type(m), id(m), set(vars(m))) for n, m in model.named_modules()] for model in (target, draft)
    ]
    plain = target.generate(prompt(40), max_new_tokens=10, do_sample=False)
    assert torch.equal(plain, target.generate(prompt(40), max_new_tokens=10, do_sample=False, assistant_model=draft))


def test_threads_share_a_model_and_its_views(target, calls):
    views = [few_rows_view(target) for _ in range(2)]
    ids = [prompt(5 + i, seed=i) for i in range(2)]
    with torch.no_grad():
        expected = [copy.deepcopy(target)(i).logits for i in ids]
    worst = [1.0, 1.0]

    def run(k):
        with torch.no_grad():
            worst[k] = max(float((views[k](ids[k]).logits - expected[k]).abs().max()) for _ in range(20))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) < 1e-4
