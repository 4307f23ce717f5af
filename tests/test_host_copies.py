"""Copies that wait for nothing but themselves: their order, without a GPU; `test_engine_gpu.py` has real ones."""

from types import SimpleNamespace

import torch

from longspec_hf.engine.host_copies import HostCopies


def test_on_a_cpu_they_are_copies():
    copies, target = HostCopies(torch.device("cpu")), torch.zeros(2, 3, dtype=torch.long)
    copies.send([[1, 2, 3], [4, 5, 6]], target)
    read = copies.fetch(target)
    target.zero_()
    assert read() == [[1, 2, 3], [4, 5, 6]]
    tensor = copies.tensor([[1, 2], [3, 4]])
    assert tensor.dtype == torch.int64 and tensor.tolist() == [[1, 2], [3, 4]]
    assert not copies.device_is_busy()


def test_a_device_is_busy_until_its_current_stream_is_done(monkeypatch):
    answers = iter([False, True])
    streams = {torch.device("cuda", 1): SimpleNamespace(query=lambda: next(answers))}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    copies = HostCopies(torch.device("cuda", 1))
    assert copies.device_is_busy() and not copies.device_is_busy()


def test_events_are_recorded_on_the_stream_of_the_tensors_device(monkeypatch):
    """Which need not be the current device; and a buffer is written again only when its last copy is done."""
    log, empty = [], torch.empty

    class Event:
        made = 0

        def __init__(self):
            Event.made += 1
            self.name = Event.made

        def record(self, stream):
            log.append(("record", self.name, stream))

        def synchronize(self):
            log.append(("wait", self.name))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    copies, target = HostCopies(torch.device("cuda", 1)), torch.zeros(1, 2, dtype=torch.long)
    for values in ([[1, 2]], [[3, 4]]):
        copies.send(values, target)
        assert target.tolist() == values
    assert log == [("wait", 1), ("record", 1, "of cpu"), ("wait", 1), ("record", 1, "of cpu")]
    log.clear()
    read = copies.fetch(target)
    target.zero_()
    assert log == [("record", 2, "of cpu")]
    assert read() == [[3, 4]] and log[-1] == ("wait", 2)
