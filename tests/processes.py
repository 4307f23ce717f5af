"""Python code in a process of its own, with nothing of this process's Hub settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_python(
    code: str,
    home: Path,
    *arguments: object,
    python: Path = Path(sys.executable),
    path: list[Path] | None = None,
    **variables: str,
) -> list[str]:
    """Run `code`, which must succeed, and return what it prints, by lines.

    Args:
        code: Python source.
        home: `HF_HOME` of the process.
        arguments: its `sys.argv[1:]`.
        python: what runs it.
        path: first places to import from; by default this checkout's.
        variables: further environment.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    places = [ROOT, ROOT / "kernels"] if path is None else path
    places = [*places, *filter(None, [kept.get("PYTHONPATH")])]  # another transformers may lie there
    environment = {
        **kept,
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **variables,
    }
    command = [python, "-c", code, *map(str, arguments)]
    result = subprocess.run(
        command, env=environment, cwd=home, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()
