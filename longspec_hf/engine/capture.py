"""CUDA graphs of functions that read and write fixed tensors, and streams beside the current one."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

SIDE_STREAMS = 2
_ONE_AT_A_TIME = threading.Lock()
_THREAD = threading.local()


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """This thread's streams for captures and for what runs beside them: few, since libraries keep memory for each."""
    known = _THREAD.__dict__.setdefault("streams", {})
    if device not in known:
        # PyTorch hands out its streams in turn; of the urgent ones hardly anybody else has one.
        known[device] = tuple(torch.cuda.Stream(device, priority=-1) for _ in range(1 + SIDE_STREAMS))
    return known[device]


class WarmKeys:
    """What this thread has run before for a model: its kernels are compiled, and libraries set up for its streams."""

    def __init__(self, owner: Any) -> None:
        known = _THREAD.__dict__.setdefault("warm", weakref.WeakKeyDictionary())
        self._keys: set[Hashable] = known.setdefault(owner, set())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._keys)

    def add(self, key: Hashable) -> None:
        """Remember `key`."""
        self._keys.add(key)

    def discard(self, key: Hashable) -> None:
        """Forget `key`, if it is known."""
        self._keys.discard(key)


class Captured:
    """A function that runs as it is at first, and as a CUDA graph from its second call on, or at once where it can.

    The first call compiles kernels and sets up libraries, which a capture must not. The function takes nothing, keeps
    what it reads and writes at fixed addresses, and never waits for the device. On other devices it is just called.

    Args:
        function: what to run; its result is returned, and holds the same tensors after every replay.
        device: where it runs.
        pool: memory pool shared with other graphs that run in turn.
        warm: whether such a function has run before in this thread: then it is captured at once.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device, pool: Any, warm: bool = False) -> None:
        self.function = function
        self.device = device
        self.pool = pool
        self.warm = warm
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.can_capture = device.type == "cuda"
        self.result: Any = None

    @property
    def replays(self) -> bool:
        """Whether the next call only replays, or runs as it is for good."""
        return self.graph is not None or (self.calls > 0 and not self.can_capture)

    def prepare(self) -> None:
        """Capture if the next call shall be a replay and this is not done yet."""
        if self.graph is not None or not self.can_capture or not (self.calls or self.warm):
            return
        graph = torch.cuda.CUDAGraph()

        def capture() -> Any:
            # Other threads may allocate meanwhile.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                return self.function()
            finally:
                graph.capture_end()

        # A graph that the collector finds meanwhile would be destroyed within the capture, which breaks it.
        collects = gc.isenabled()
        with _ONE_AT_A_TIME:
            gc.disable()
            try:
                self.result = self._beside(capture)
                self.graph = graph
            except RuntimeError as error:
                # A module or a draft of the user's own waits for the device, or fails: then it does so uncaptured too.
                self.can_capture = False
                warnings.warn(f"Rounds are not captured, and slower for it: {_first_line(error)}", stacklevel=2)
            finally:
                if collects:
                    gc.enable()

    def __call__(self) -> Any:
        self.prepare()
        self.calls += 1
        if self.graph is not None:
            self.graph.replay()
        else:
            self.result = self._beside(self.function) if self.device.type == "cuda" else self.function()
        return self.result

    def _beside(self, function: Callable[[], Any]) -> Any:
        """Call it on the stream of captures, in order with the current one."""
        stream = _streams(self.device)[0]
        with torch.cuda.device(self.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = function()
            torch.cuda.current_stream().wait_stream(stream)
        return result


def together(device: torch.device, *functions: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Results of at most three functions that do not depend on one another, at the same time where there are streams.

    Kernels that leave a part of the device idle, as most do at their end, fill one another's gaps.
    """
    if device.type != "cuda":
        return [function() for function in functions]
    current = torch.cuda.current_stream(device)
    beside = list(zip(_streams(device)[1:], functions[1:], strict=False))
    results: list[Any] = [None]
    for stream, function in beside:
        # Also makes sure that memory this stream reuses is no longer read by the current one.
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(function())
    results[0] = functions[0]()
    for stream, _ in beside:
        current.wait_stream(stream)
    return results


def _first_line(error: BaseException) -> str:
    """What went wrong first: ending a broken capture fails too, and hides it."""
    cause = error.__context__ or error
    return str(cause).split("\n", 1)[0]
