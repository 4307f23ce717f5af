"""`longspec-hf env`: what a bug report should say about the machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

import torch
from longspec_hf_kernels.backends import ENVIRONMENT_VARIABLE, available_backends

from ..embedded import CACHE_VARIABLE
from ..version import __version__

PACKAGES = ("transformers", "huggingface-hub", "safetensors", "triton", "flash-attn", "accelerate", "peft", "gguf")
VARIABLES = (ENVIRONMENT_VARIABLE, CACHE_VARIABLE, "TRITON_INTERPRET", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES")
HEAD_DIM = 128  # the usual one


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "env",
        help="versions, devices and attention backends, for bug reports",
        description="Print versions, devices and attention backends. Nothing secret: paste it into a bug report.",
    )
    parser.set_defaults(run=lambda args: print("\n".join(describe_environment())))


def describe_environment() -> list[str]:
    """Lines `name: value`."""
    rows = [("longspec-hf", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    rows += [("torch", torch.__version__), ("cuda of torch", torch.version.cuda or "none")]
    rows += [(name, _version(name)) for name in PACKAGES]
    rows.append(
        ("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; {_backends('cpu', torch.float32)}")
    )
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"cuda:{index}",
                f"{found.name}, {found.total_memory / 2**30:.0f} GiB, capability {found.major}.{found.minor}; "
                f"{_backends(f'cuda:{index}', torch.bfloat16)}",
            )
        )
    rows += [(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    return [f"{name}: {value}" for name, value in rows]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _backends(device: str, dtype: torch.dtype) -> str:
    query = torch.empty(1, 1, 1, HEAD_DIM, device=device, dtype=dtype)
    return f"tree attention for {str(dtype).removeprefix('torch.')}: {', '.join(available_backends(query))}"
