"""Python commands as forks of one process, so that each begins with what takes long to import.

`warm_python` writes a script that stands for `python`: its commands have the caller's folder, environment, streams and
exit code. This project's packages are not imported ahead, so every command imports them from where it is told to.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from multiprocessing import connection, get_context
from pathlib import Path

TORCH = ("torch._dynamo", "torch.distributed.tensor", "scipy.optimize")
TRANSFORMERS = (*TORCH, "transformers.pipelines", "transformers.trainer", "peft")


@contextlib.contextmanager
def warm_python(folder: Path, imported: tuple[str, ...]) -> Iterator[Path]:
    """The script, written to `folder`, while the process behind it waits for commands with these modules imported."""
    import subprocess

    script, address = folder / "python", folder / "socket"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" ask "{address}" "$@"\n')
    script.chmod(0o755)
    command = [sys.executable, __file__, "serve", address, *imported]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"ready\n"
        yield script
        server.terminate()


def serve(address: str, *imported: str) -> None:
    """Answer every connection in a process of its own."""
    import importlib

    for name in imported:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            caller, _ = listener.accept()
            get_context("fork").Process(target=answer, args=(caller,)).start()
            caller.close()


def answer(caller: socket.socket) -> None:
    """Run the command that was sent, in another process; send its exit code, or end it where the caller ends."""
    _, streams, _, _ = socket.recv_fds(caller, 1, 3)
    with caller.makefile("r", encoding="utf-8") as lines:
        command = get_context("fork").Process(target=execute, args=(streams, *json.loads(lines.readline())))
    command.start()
    if command.sentinel not in connection.wait([command.sentinel, caller]):
        command.terminate()
    command.join()
    with contextlib.suppress(OSError):
        caller.sendall(b"%d" % command.exitcode)


def execute(streams: list[int], folder: str, environment: dict[str, str], arguments: list[str]) -> None:
    """`-c CODE`, `-m MODULE` or a script, each with its arguments."""
    import runpy

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0)
    os.chdir(folder)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    places = environment.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    kind, *rest = sys.argv = arguments[arguments[0] == "-u" :]
    first = folder if kind in ("-c", "-m") else os.path.dirname(os.path.abspath(kind))
    sys.path[:] = [first, *filter(None, places), *(place for place in sys.path[1:] if place not in inherited)]
    if kind == "-c":
        sys.argv = [kind, *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(kind, run_name="__main__")


def ask(address: str, *arguments: str) -> int:
    """Have a command run; its exit code, or 1 if there is none."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps([os.getcwd(), dict(os.environ), arguments]).encode() + b"\n")
        return abs(int(server.recv(16) or b"1"))


if __name__ == "__main__":
    sys.exit({"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:]))
