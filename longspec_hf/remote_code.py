"""Drafts for `trust_remote_code=True`: a folder whose small Python file leads to the installed package.

The draft needs the package's kernels and its hook in `generate` anyway, so the file holds no copy of the model: it
imports the package, which registers everything, or says how to install it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

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


def export_with_remote_code(draft: str | os.PathLike, output_dir: str | os.PathLike) -> Path:
    """Copy a draft to a folder that `AutoModel.from_pretrained(folder, trust_remote_code=True)` can load.

    Args:
        draft: folder or Hub id.
        output_dir: a new or empty folder.

    Returns:
        The folder.

    Raises:
        ValueError: `draft` is no LongSpec draft, or `output_dir` holds files.
    """
    source, output = Path(draft), Path(output_dir)
    # Of a repository only the configuration is fetched before it is known to hold a draft.
    config = source / "config.json" if source.is_dir() else Path(hf_hub_download(str(draft), "config.json"))
    fields = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    if fields.get("model_type") != "longspec":
        raise ValueError(
            f"`draft` must be a folder or a Hub id of a LongSpec draft, got {str(draft)!r}, whose config.json has "
            f"`model_type` {fields.get('model_type')!r}, expected 'longspec'. Convert or train one first."
        )
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"`output_dir` must be a new or empty folder, got {str(output_dir)!r}, which holds files.")
    source = source if source.is_dir() else Path(snapshot_download(str(draft)))
    shutil.copytree(source, output, dirs_exist_ok=True)
    fields["auto_map"] = {name: f"{Path(CODE_FILE).stem}.{cls}" for name, cls in AUTO_MAP.items()}
    (output / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    (output / CODE_FILE).write_text(CODE, encoding="utf-8")
    return output
