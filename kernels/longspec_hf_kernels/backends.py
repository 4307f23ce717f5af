"""Which implementation runs: by device and availability, or as `LONGSPEC_ATTENTION` says."""

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

from .torch_attention import hybrid_tree_attention_torch

ENVIRONMENT_VARIABLE = "LONGSPEC_ATTENTION"
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLASH_DTYPES = (torch.float16, torch.bfloat16)
# Head sizes at which the scheme is tested on a GPU.
FLASH_HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_HEAD_DIM = 256
# Below this compute capability the matrix units have no bf16.
MIN_CUDA_MAJOR = 8


@functools.cache
def has_flash_attn() -> bool:
    """Whether the flash-attn package is installed; without it "flash" uses PyTorch's own flash kernel."""
    spec = importlib.util.find_spec("flash_attn")
    # flash-attn-4 alone makes this a folder without a module of its own, and has no kernel for decoding.
    return spec is not None and spec.origin is not None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _device_runs_triton(device: torch.device, interpreted: bool) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= MIN_CUDA_MAJOR
    return device.type == "cpu" and interpreted


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def available_backends(query: torch.Tensor) -> tuple[str, ...]:
    """Names of the backends that can run `query` (its device, dtype and head size), best first.

    Triton's interpreter (`TRITON_INTERPRET=1`) lets "triton" run on the CPU, slowly, for tests; it is
    never the first choice there.
    """
    found = []
    if (
        _has_triton()
        and query.dtype in TRITON_DTYPES
        and query.shape[-1] <= MAX_HEAD_DIM
        and _device_runs_triton(query.device, _interpreted())
    ):
        found.append("triton")
        if query.dtype in FLASH_DTYPES and query.shape[-1] in FLASH_HEAD_DIMS and query.device.type == "cuda":
            found.append("flash")
    return (*found, "torch") if query.device.type == "cuda" else ("torch", *found)


def select_backend(query: torch.Tensor, window: int | None = None, softcap: float | None = None) -> str:
    """The backend for `query`: "triton", "flash" or "torch".

    A flash kernel has no windows by node position, and PyTorch's no soft-cap: there a choice of "flash" gives
    way to the best other backend.

    Raises:
        ValueError: `LONGSPEC_ATTENTION` names no backend, or one that cannot run `query`.
    """
    available = available_backends(query)
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if not wanted:
        return available[0]
    if wanted not in available:
        raise ValueError(
            f"`{ENVIRONMENT_VARIABLE}` must name a backend that can run {query.dtype} with a head size of "
            f"{query.shape[-1]} on {query.device}, one of {', '.join(sorted(available))}; got {wanted!r}: "
            "unset it to let the device decide."
        )
    if wanted == "flash" and (window is not None or (softcap is not None and not has_flash_attn())):
        return available[0]
    return wanted


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether the fused steps run as Triton kernels on `tensor`: on a GPU unless `LONGSPEC_ATTENTION=torch`.

    On the CPU only in Triton's interpreter and with `LONGSPEC_ATTENTION=triton`, for tests.
    """
    wanted, on_cpu = os.environ.get(ENVIRONMENT_VARIABLE), tensor.device.type == "cpu"
    if wanted == "torch" or (wanted != "triton" and on_cpu):
        return False
    fits = tensor.dtype in TRITON_DTYPES or not tensor.is_floating_point()
    return _has_triton() and fits and _device_runs_triton(tensor.device, on_cpu and _interpreted())


def load_backend(name: str) -> Callable[..., torch.Tensor]:
    """The implementation called `name`; Triton is imported only here."""
    if name == "triton":
        from .triton_attention import hybrid_tree_attention_triton

        return hybrid_tree_attention_triton
    if name == "flash":
        from .flash_attention import hybrid_tree_attention_flash

        return hybrid_tree_attention_flash
    return hybrid_tree_attention_torch
