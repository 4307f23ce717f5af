"""All kernels compile for the GPUs they are for, which needs Triton's compiler and no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")
SCRIPT = Path(__file__).parent / "compile_kernels.py"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability, tmp_path):
    """On Hopper and later with early launches, on Hopper with tensor maps."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "LONGSPEC"))}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    compiled = result.stdout.split("\n")
    assert "split_attention_kernel" in compiled and "few_rows_kernel" in compiled
    assert not [line for line in compiled if line.startswith("missing")]
