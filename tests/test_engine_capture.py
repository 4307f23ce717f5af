"""When a function is captured, and what becomes of one that cannot be; graphs themselves need a GPU."""

import gc
import threading

import pytest
import torch

from longspec_hf.engine import capture
from longspec_hf.engine.capture import Captured, WarmKeys, together


class FakeGraph:
    """Records what is asked of a graph."""

    broken = False

    def __init__(self):
        self.replayed = 0

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local" and not gc.isenabled()

    def capture_end(self):
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self):
        self.replayed += 1


@pytest.fixture
def graphs(monkeypatch):
    """Captures without a GPU."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(Captured, "_beside", lambda self, function: function())
    monkeypatch.setattr(FakeGraph, "broken", False)


def test_the_first_call_runs_and_the_others_replay(graphs):
    calls = []
    captured = Captured(lambda: calls.append(1) or len(calls), torch.device("cuda"), None)
    assert captured() == 1 and not captured.replays
    assert captured() == 2 and captured.replays  # the capture calls it once more, and keeps what it returned
    assert captured() == 2 and captured.graph.replayed == 2 and len(calls) == 2
    assert gc.isenabled()


def test_what_has_run_before_is_captured_at_once(graphs):
    calls = []
    captured = Captured(lambda: calls.append(1) or len(calls), torch.device("cuda"), None, warm=True)
    captured.prepare()
    assert captured.replays and len(calls) == 1
    assert captured() == 1 and captured.graph.replayed == 1 and len(calls) == 1


def test_each_thread_has_run_what_it_has_run():
    owner, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    WarmKeys(owner).add("key")
    assert "key" in WarmKeys(owner) and "key" not in WarmKeys(other)
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append("key" in WarmKeys(owner)))
    thread.start()
    thread.join()
    assert elsewhere == [False]  # its streams have no workspaces yet
    WarmKeys(owner).discard("key")
    assert "key" not in WarmKeys(owner)


def test_what_cannot_be_captured_runs_as_it_is(graphs, monkeypatch):
    calls = []

    def function():
        calls.append(1)
        if len(calls) == 2:
            monkeypatch.setattr(FakeGraph, "broken", True)
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        return len(calls)

    captured = Captured(function, torch.device("cuda"), None)
    assert captured() == 1
    with pytest.warns(UserWarning, match="not captured, and slower for it: Cannot copy between CPU and CUDA"):
        assert captured() == 3
    assert captured() == 4 and captured.replays and captured.graph is None
    assert gc.isenabled()


def test_errors_of_the_function_itself_are_raised(graphs):
    def function():
        raise ValueError("on purpose")

    captured = Captured(function, torch.device("cuda"), None)
    with pytest.raises(ValueError, match="on purpose"):
        captured()


def test_elsewhere_it_is_just_called():
    captured = Captured(lambda: torch.ones(1), torch.device("cpu"), None)
    assert captured() is not captured() and captured.graph is None and captured.replays


def test_functions_side_by_side_keep_their_order():
    results = together(torch.device("cpu"), *(lambda i=i: torch.tensor(i) for i in range(3)))
    assert [int(result) for result in results] == [0, 1, 2]
    assert capture.SIDE_STREAMS >= 2
