"""Drafts for `trust_remote_code=True`: a folder whose small Python file leads to the installed package.

The draft needs the package's kernels and its hook in `generate` anyway, so the file holds no copy of the model: it
imports the package, which registers everything, or says how to install it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

CODE_FILE = "modeling_longspec_remote.py"
AUTO_MAP = {
    "AutoConfig": "RemoteLongSpecDraftConfig",
    "AutoModel": "RemoteLongSpecDraftModel",
    "AutoModelForCausalLM": "RemoteLongSpecDraftModel",
}
CODE = '''"""Leads `trust_remote_code=True` to the package longspec-hf, which holds the draft's code."""

try:
    from longspec_hf import LongSpecDraftConfig, LongSpecDraftModel
except ImportError as error:
    raise ImportError(
        "This is a LongSpec draft, and its code is in a package that is not installed here. "
        "Run `pip install longspec-hf` and load it again."
    ) from error


class RemoteLongSpecDraftConfig(LongSpecDraftConfig):
    """transformers marks the classes it finds here; the package's own stay unmarked."""


class RemoteLongSpecDraftModel(LongSpecDraftModel):
    config_class = RemoteLongSpecDraftConfig
    config: RemoteLongSpecDraftConfig
'''


# What training leaves beside a draft, and what fetching does.
LEFTOVERS = (
    "checkpoint-*",
    "global_step*",
    "runs",
    "latest",
    "zero_to_fp32.py",
    "optimizer*",
    "pytorch_model_fsdp*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "training_args.bin",
    ".git",
    ".cache",
)
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def export_with_remote_code(draft: str | os.PathLike, output_dir: str | os.PathLike) -> Path:
    """Copy a draft to a folder that `AutoModel.from_pretrained(folder, trust_remote_code=True)` can load.

    What training leaves beside it (`LEFTOVERS`) stays behind. The folder appears complete or not at all.

    Args:
        draft: folder or Hub id.
        output_dir: a new or empty folder, not one in the draft's.

    Returns:
        The folder.

    Raises:
        ValueError: `draft` is no LongSpec draft or holds no weights, or `output_dir` holds files.
    """
    source, output = Path(draft), Path(output_dir)
    # Of a repository only the configuration is fetched before it is known to hold a draft.
    config = source / "config.json" if source.is_dir() else Path(hf_hub_download(str(draft), "config.json"))
    fields = _read_config(config)
    if fields.get("model_type") != "longspec":
        raise ValueError(
            f"`draft` must be a folder or a Hub id of a LongSpec draft, got {str(draft)!r}, whose config.json has "
            f"`model_type` {fields.get('model_type')!r}, expected 'longspec'. Convert or train one first."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output_dir` must be a new or empty folder, got {str(output_dir)!r}, which holds files.")
    if source.is_dir() and source.resolve() in output.resolve().parents:
        raise ValueError(f"`output_dir` must not lie in the draft's own folder, got {str(output_dir)!r}.")
    if not source.is_dir():
        left_out = [*LEFTOVERS, *(f"{name}/*" for name in LEFTOVERS)]
        source = Path(snapshot_download(str(draft), ignore_patterns=left_out))
    if not any(path.is_file() for pattern in WEIGHTS for path in source.glob(pattern)):
        raise ValueError(
            f"`draft` must hold weights, {' or '.join(WEIGHTS)}, got {str(draft)!r} without. Save the draft again."
        )
    fields["auto_map"] = {name: f"{Path(CODE_FILE).stem}.{cls}" for name, cls in AUTO_MAP.items()}
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed when complete, so that an interrupted call leaves nothing half-written.
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.") as scratch:
        made = Path(scratch) / "made"
        shutil.copytree(source, made, ignore=shutil.ignore_patterns(*LEFTOVERS))
        (made / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        (made / CODE_FILE).write_text(CODE, encoding="utf-8")
        if output.exists():
            output.rmdir()
        made.rename(output)
    return output


def _read_config(path: Path) -> dict[str, Any]:
    """A config.json; nothing if there is none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"`draft` has a config.json that cannot be read: {path}: {error}. Save it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"`draft` must have a config.json with one JSON object, got a {type(fields).__name__} in {path}."
        )
    return fields
