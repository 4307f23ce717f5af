"""Which projections of a layer are read by their weights, and that both ways compute the same."""

import os
from types import SimpleNamespace

import pytest
import torch
from longspec_hf_kernels import add_rms_norm, rotate_and_store, silu_and_multiply
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE
from torch import nn

from longspec_hf.engine import linears
from longspec_hf.modeling_longspec import LongSpecMLP

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on a CPU in Triton's interpreter only"
)
HIDDEN, INTERMEDIATE, ROWS, HEAD_DIM = 64, 128, 3, 16
MLP_READERS = ["gated_linear", "linear_add_rms_norm"]
ATTENTION_READERS = ["project_rotate_and_store", "project_rotate"]
READERS = MLP_READERS + ATTENTION_READERS


class Sizes:
    hidden_size = HIDDEN
    intermediate_size = INTERMEDIATE
    hidden_act = "silu"


class Scaled(nn.Linear):
    """Another kind of layer: its weight is not what it multiplies by."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def read(monkeypatch):
    """Runs kernels in the interpreter; says how often a weight was read instead of its module called."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    counts = dict.fromkeys(READERS, 0)
    for name in counts:
        original = getattr(linears, name)

        def counted(*args, _name=name, _original=original, **options):
            counts[_name] += 1
            return _original(*args, **options)

        monkeypatch.setattr(linears, name, counted)
    return counts


def mlp_of(kind):
    torch.manual_seed(0)
    mlp = LongSpecMLP(Sizes())
    if kind == "bias":
        mlp.up_proj = nn.Linear(HIDDEN, INTERMEDIATE)
        mlp.down_proj = nn.Linear(INTERMEDIATE, HIDDEN)
    elif kind == "subclass":
        mlp.gate_proj = Scaled(HIDDEN, INTERMEDIATE, bias=False)
        mlp.down_proj = Scaled(INTERMEDIATE, HIDDEN, bias=False)
    elif kind == "hook":
        for projection in (mlp.gate_proj, mlp.down_proj):
            projection.register_forward_hook(lambda module, args, output: 2 * output)
    elif kind == "replaced forward":
        for projection in (mlp.up_proj, mlp.down_proj):
            projection.forward = lambda x, original=projection.forward: 2 * original(x)
    return mlp.half()


@needs_interpreter
@pytest.mark.parametrize("kind", ["ordinary", "bias", "subclass", "hook", "replaced forward"])
def test_weights_are_read_only_of_ordinary_layers(kind, read):
    mlp = mlp_of(kind)
    x, residual = (torch.randn(1, ROWS, HIDDEN, generator=torch.Generator().manual_seed(s)).half() for s in (1, 2))
    norm = torch.ones(HIDDEN).half()
    with torch.no_grad():
        opened = linears.opened_gate(mlp, x)
        found = linears.project_add_norm(mlp.down_proj, opened, residual, norm, 1e-5)
        expected = silu_and_multiply(mlp.gate_proj(x), mlp.up_proj(x))
        torch.testing.assert_close(opened, expected, rtol=4e-3, atol=1e-3)
        for got, wanted in zip(found, add_rms_norm(mlp.down_proj(opened), residual, norm, 1e-5), strict=True):
            torch.testing.assert_close(got, wanted, rtol=4e-3, atol=2e-3)
    assert {read[name] for name in MLP_READERS} == {int(kind == "ordinary")}


def attention_of(kind):
    torch.manual_seed(0)
    attention = SimpleNamespace(
        q_proj=nn.Linear(HIDDEN, 4 * HEAD_DIM, bias=kind == "bias"),
        k_proj=nn.Linear(HIDDEN, 2 * HEAD_DIM, bias=kind == "bias"),
        v_proj=nn.Linear(HIDDEN, 2 * HEAD_DIM, bias=kind == "bias"),
    )
    if kind == "subclass":
        attention.q_proj = Scaled(HIDDEN, 4 * HEAD_DIM, bias=False)
    elif kind == "hook":
        for projection in (attention.q_proj, attention.v_proj):
            projection.register_forward_hook(lambda module, args, output: 2 * output)
    elif kind == "replaced forward":
        for projection in (attention.q_proj, attention.k_proj):
            projection.forward = lambda x, original=projection.forward: 2 * original(x)
    for projection in vars(attention).values():
        projection.half()
    return attention


@needs_interpreter
@pytest.mark.parametrize("kind", ["ordinary", "bias", "subclass", "hook", "replaced forward"])
def test_an_attentions_weights_are_read_only_of_ordinary_layers(kind, read):
    """Biases are added there too."""
    attention = attention_of(kind)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, ROWS, HIDDEN, generator=generator).half()
    cos, sin = torch.randn(2, 1, ROWS, HEAD_DIM, generator=generator).half()
    buffers, twins = torch.zeros(2, 2, 1, 2, 10, HEAD_DIM).half()
    first = torch.tensor([4], dtype=torch.int32)
    with torch.no_grad():
        got = linears.project_and_store(attention, x, cos, sin, *buffers, first, head_dim=HEAD_DIM)
        alone = linears.project_queries(attention, x, cos, sin, head_dim=HEAD_DIM)
        projected = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
        expected = rotate_and_store(*projected, cos, sin, *twins, first, head_dim=HEAD_DIM)
    for found, wanted in ((got, expected), (alone, expected), (buffers, twins)):
        torch.testing.assert_close(found, wanted, rtol=4e-3, atol=2e-3)
    assert {read[name] for name in ATTENTION_READERS} == {int(kind in ("ordinary", "bias"))}


@needs_interpreter
def test_what_the_kernels_are_not_made_for_is_called(read):
    with torch.no_grad():
        linears.opened_gate(mlp_of("ordinary").float(), torch.randn(1, ROWS, HIDDEN))
        linears.opened_gate(mlp_of("ordinary"), torch.randn(1, 65, HIDDEN).half())
    assert read["gated_linear"] == 0


@needs_interpreter
@pytest.mark.parametrize("kind", ["ordinary", "subclass", "hook", "replaced forward", "max_norm"])
def test_the_table_is_read_only_of_ordinary_embeddings(kind, read, monkeypatch):
    """Gemma's, for example, are scaled."""

    class ScaledEmbedding(nn.Embedding):
        def forward(self, token_ids):
            return 2 * super().forward(token_ids)

    torch.manual_seed(0)
    embed = (ScaledEmbedding if kind == "subclass" else nn.Embedding)(20, HIDDEN)
    if kind == "hook":
        embed.register_forward_hook(lambda module, args, output: 2 * output)
    elif kind == "replaced forward":
        embed.forward = lambda ids, original=embed.forward: 2 * original(ids)
    elif kind == "max_norm":
        embed.max_norm = 1.0
    token_ids, norm = torch.tensor([[3, 7, 7]]), torch.ones(HIDDEN)
    reads, original = [], linears.embed_rms_norm
    monkeypatch.setattr(linears, "embed_rms_norm", lambda *args: reads.append(1) or original(*args))
    with torch.no_grad():
        found = linears.embedded_normed(embed, token_ids, norm, 1e-5)
        for got, wanted in zip(found, add_rms_norm(embed(token_ids), None, norm, 1e-5), strict=True):
            torch.testing.assert_close(got, wanted)
    assert len(reads) == (kind == "ordinary")


def test_projections_with_hooks_of_all_modules_are_called():
    layer = nn.Linear(HIDDEN, HIDDEN, bias=False)
    assert linears._is_as_made(layer)
    modules = nn.modules.module
    for register in (modules.register_module_forward_hook, modules.register_module_forward_pre_hook):
        hook = register(lambda *_: None)
        try:
            assert not linears._is_as_made(layer)
        finally:
            hook.remove()
    assert linears._is_as_made(layer)
