"""Shared fixtures. Tests run single-threaded so that several processes share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is imported, in the processes of tests too

import pytest
import torch
from models import tiny_target
from warm_python import TORCH, TRANSFORMERS, warm_python

import longspec_hf  # noqa: F401  (registers the drafts)
from longspec_hf.engine import rounds, support

# Modules whose tests take longest: first, so that no process is left alone with one at the end.
LONGEST = (
    "test_readme.py",
    "test_lossless.py",
    "test_embedded.py",
    "test_distributed.py",
    "test_tensor_parallel.py",
    "test_end_to_end.py",
    "test_random_options.py",
    "test_sampling.py",
    "test_release.py",
    "test_hub.py",
    "test_remote_code.py",
    "test_losses.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target():
    """The tiny fp32 Llama most tests use."""
    return tiny_target()


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A script like `python` whose commands begin with PyTorch and transformers imported."""
    with warm_python(tmp_path_factory.mktemp("warm"), TRANSFORMERS) as script:
        yield script


@pytest.fixture(scope="session")
def warm_torch(tmp_path_factory):
    """The same without transformers, which reads the Hub's settings when it is imported."""
    with warm_python(tmp_path_factory.mktemp("warm_torch"), TORCH) as script:
        yield script


@pytest.fixture
def engine_on_cpu():
    """The engine decodes on the CPU too, uncaptured, and drafts ahead as on a GPU."""
    for devices in (support.ENGINE_DEVICES, rounds.DRAFTS_AHEAD):
        devices.add("cpu")
    yield
    for devices in (support.ENGINE_DEVICES, rounds.DRAFTS_AHEAD):
        devices.discard("cpu")
