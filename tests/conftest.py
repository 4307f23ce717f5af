"""Shared fixtures. Tests run single-threaded so that several processes share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is imported, in the processes of tests too

import pytest
import torch
from models import tiny_target

import longspec_hf  # noqa: F401  (registers the drafts)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target():
    """The tiny fp32 Llama most tests use."""
    return tiny_target()
