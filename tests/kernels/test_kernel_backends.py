"""The choice of backend, the operator under torch.compile, and an import without Triton."""

import subprocess
import sys

import pytest
import torch
from attention_cases import TOLERANCE, make_case, needs_interpreter
from longspec_hf_kernels import hybrid_tree_attention
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE, available_backends, has_flash_attn, select_backend

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from longspec_hf_kernels import hybrid_tree_attention
x = torch.ones(1, 1, 2, 16)
print(hybrid_tree_attention(x, x, x, torch.tensor([2]), None, scale=1.0).sum().item())
"""


def test_the_cpu_uses_pytorch(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert select_backend(torch.zeros(1, 1, 1, 64)) == "torch"


@pytest.mark.parametrize("wrong", ["cuda", "flash", "Triton"])
def test_an_unknown_or_unavailable_backend_is_named(monkeypatch, wrong):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, wrong)
    with pytest.raises(ValueError, match=rf"`LONGSPEC_ATTENTION` must name .* torch.*; got '{wrong}'"):
        make_case(prefixes=[3]).run(hybrid_tree_attention)


@pytest.mark.parametrize("whole", [True, False], ids=["flash-attn", "flash-attn-4 alone"])
def test_flash_attn_is_a_package_with_a_module_of_its_own(whole, tmp_path, monkeypatch):
    """flash-attn-4 installs nothing but a folder within the same name, without the kernel that is asked for."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    if whole:
        (tmp_path / "flash_attn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert has_flash_attn.__wrapped__() == whole


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert available_backends(torch.zeros(1, 1, 1, 64)) == ("torch",)


@needs_interpreter
def test_override_by_environment(monkeypatch):
    case = make_case(prefixes=[20], sinks=True)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert select_backend(case.arguments[0]) == "triton"
    assert case.error(hybrid_tree_attention) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype, size", [(torch.float64, 64), (torch.float32, 512)])
def test_what_triton_cannot_run_goes_to_pytorch(dtype, size):
    assert available_backends(torch.zeros(1, 1, 1, size, dtype=dtype)) == ("torch",)


def test_importing_and_running_need_no_triton():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "32.0", run.stderr


@pytest.mark.parametrize("tree", [True, False])
def test_compiles_without_a_graph_break(tree):
    case = make_case(prefixes=[20, 3], window=8 if tree else None, sinks=True, tree=tree, starts=[1, 0])

    def function(*arguments):
        return hybrid_tree_attention(*arguments, **case.options).transpose(1, 2).reshape(2, 5, -1) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case.arguments), function(*case.arguments))


def test_operator_passes_pytorch_own_checks():
    """Schema, fake implementation (shape, dtype, strides) and dynamic shapes."""
    case = make_case(prefixes=[20, 3], window=8, dtype=torch.float16)
    options = case.options
    arguments = (*case.arguments, options["starts"], options["depths"], options["key_depths"], options["sinks"])
    torch.library.opcheck(
        torch.ops.longspec_hf.hybrid_tree_attention.default,
        (*arguments, options["scale"], options["window"], options["softcap"]),
        test_utils=("test_schema", "test_faketensor"),
    )
