"""The paper's scheme in the interpreter: its tree kernel and merge, with the prefix part spelled out in PyTorch."""

import pytest
import torch
from attention_cases import TOLERANCE, make_case, needs_interpreter, relative_error
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE, FLASH_HEAD_DIMS, has_flash_attn, select_backend
from longspec_hf_kernels.merge import explicit_attention

pytest.importorskip("triton", reason="the kernels are written in Triton")

from longspec_hf_kernels import backends, flash_attention
from longspec_hf_kernels.flash_attention import hybrid_tree_attention_flash

without_flash_attn = pytest.mark.skipif(has_flash_attn(), reason="flash-attn has a soft-cap of its own")


def explicit_prefix(query, key, value, scale):
    """What `_torch_flash` returns, on any device: `[1, H, T, D]` and its natural log-sum-exp."""
    group = query.shape[1] // key.shape[1]
    key, value = (rows[0].repeat_interleave(group, 0) for rows in (key, value))
    out, lse = explicit_attention(query[0], key, value, None, scale=scale)
    return out.to(query.dtype).unsqueeze(0), lse.unsqueeze(0)


def scheme_case(monkeypatch, **arguments):
    monkeypatch.setattr(flash_attention, "has_flash_attn", lambda: False)
    monkeypatch.setattr(flash_attention, "_torch_flash", explicit_prefix)
    case = make_case(key_depths=False, **arguments)
    for name in ("window", "depths", "key_depths"):
        del case.options[name]
    return case


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", FLASH_HEAD_DIMS)
def test_prefix_and_tree_merge_to_one_softmax(monkeypatch, head_dim, dtype):
    """C73. Rows nobody may see are NaN: before the starts, behind each tree, and of the tree itself."""
    case = scheme_case(monkeypatch, prefixes=[70, 0, 33], starts=[3, 0, 33], nodes=9, tree_keys=40, head_dim=head_dim,
                       dtype=dtype, sinks=True)  # fmt: skip
    assert case.error(hybrid_tree_attention_flash) < TOLERANCE[dtype]
    packed = case.run(hybrid_tree_attention_flash, packed=True)
    assert relative_error(packed, case.expected()) < TOLERANCE[dtype]
    monkeypatch.setattr(flash_attention, "has_flash_attn", lambda: True)  # PyTorch's can be asked for all the same
    assert torch.equal(case.run(hybrid_tree_attention_flash, packed=True, package=False), packed)


@needs_interpreter
@pytest.mark.parametrize("prefix, tree", [(40, False), (0, False), (0, True), (64, True)])
def test_a_missing_part_leaves_the_other(monkeypatch, prefix, tree):
    case = scheme_case(monkeypatch, prefixes=[prefix], nodes=3, tree=tree, head_dim=16)
    assert case.error(hybrid_tree_attention_flash) < TOLERANCE[torch.float32]


@without_flash_attn
def test_a_soft_cap_is_refused_and_never_chosen(monkeypatch):
    """PyTorch's flash kernel would ignore it without a word."""
    case = make_case(prefixes=[9], softcap=3.0)
    with pytest.raises(ValueError, match=r"`softcap` must be None without .* got 3.0"):
        hybrid_tree_attention_flash(*case.arguments, scale=1.0, softcap=3.0)
    monkeypatch.setattr(backends, "available_backends", lambda query: ("triton", "flash", "torch"))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "flash")
    query = case.arguments[0]
    assert select_backend(query) == "flash"
    assert select_backend(query, softcap=3.0) == select_backend(query, window=4) == "triton"
