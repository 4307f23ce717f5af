"""Which attention a configuration asks for, while some threads verify trees and others run the same model plainly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class AttentionSwitch:
    """Points a configuration at one name while at least one thread is inside `pointed`, and remembers what it said.

    Args:
        name: the implementation to point to.
        read, write: access to a configuration's implementation.
    """

    def __init__(self, name: str, read: Callable[[Any], str], write: Callable[[Any, str], None]) -> None:
        self.name = name
        self._read = read
        self._write = write
        self._lock = threading.Lock()
        self._entries: dict[int, tuple[str, int]] = {}  # id(config) -> (the user's choice, threads inside)

    @contextmanager
    def pointed(self, config: object) -> Iterator[None]:
        """Inside the block `config` names our implementation; the user's is back when the last thread leaves."""
        with self._lock:
            chosen, users = self._entries.get(id(config), (self._read(config), 0))
            self._entries[id(config)] = (chosen, users + 1)
            self._write(config, self.name)
        try:
            yield
        finally:
            with self._lock:
                chosen, users = self._entries.pop(id(config))
                if users > 1:
                    self._entries[id(config)] = (chosen, users - 1)
                else:
                    self._write(config, chosen)

    def chosen(self, config: object) -> str:
        """The user's choice, whether or not some thread verifies right now."""
        with self._lock:
            entry = self._entries.get(id(config))
            return self._read(config) if entry is None else entry[0]
