"""Tensors of a checkpoint: a folder or a Hub repository, safetensors or `.bin`, in one file or in shards."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

# Kind of file and the usual name of a checkpoint in one file, the preferred kind first.
KINDS = ((".safetensors", "model.safetensors"), (".bin", "pytorch_model.bin"))


def checkpoint_folder(
    source: str | os.PathLike,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint: `source` itself, or where the Hub's client keeps the repository of that name.

    Of a repository only the configuration and the weights are fetched, `.bin` files where there are no others of the
    usual name or with an index.

    Raises:
        ValueError: there is no such folder or repository.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise ValueError(f"`source` must be a folder or a Hub repository, got the file {source}. Give its folder.")
    folder = Path()
    for suffix, usual in KINDS:
        try:
            folder = Path(
                snapshot_download(
                    str(source),
                    revision=revision,
                    cache_dir=None if cache_dir is None else Path(cache_dir),
                    local_files_only=local_files_only,
                    allow_patterns=["config.json", f"*{suffix}", f"*{suffix}.index.json"],
                )
            )
        except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ValueError(
                f"`source` must be a folder or a Hub repository, got {str(source)!r} (revision {revision or 'main'}), "
                f"neither here nor to be fetched: {error}. Check the name, the revision and the connection."
            ) from error
        if _named_files(folder, suffix, usual):
            break
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint in `folder`, on the CPU, in the file's names and dtypes.

    Raises:
        ValueError: no weights, several candidates, a shard that is not there, or a file that holds no tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors.update(_read(path))
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The weight files of `folder`: the shards its index names, else the file of the usual name, else the only one."""
    for suffix, usual in KINDS:
        if named := _named_files(folder, suffix, usual):
            return named if named[0].name == usual else _shards(named[0])
    for suffix, usual in KINDS:
        found = sorted(folder.glob(f"*{suffix}.index.json")) or sorted(folder.glob(f"*{suffix}"))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(
                f"`source` ({folder}) must hold one checkpoint, got {names}. Keep the draft's, or name it {usual}."
            )
        if found:
            return found
    raise ValueError(
        f"`source` ({folder}) must hold weights, {KINDS[0][1]} or {KINDS[1][1]} or their shards, got none."
    )


def _named_files(folder: Path, suffix: str, usual: str) -> list[Path]:
    """The file of the usual name, else the only index; nothing if there is neither."""
    if (folder / usual).is_file():
        return [folder / usual]
    indices = list(folder.glob(f"*{suffix}.index.json"))
    return indices if len(indices) == 1 else []


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"`source` has an index without a `weight_map`: {index}. Fetch the file again.") from error
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ValueError(
            f"`source` ({index.parent}) lacks {', '.join(absent)}, which {index.name} names. Fetch it again."
        )
    return [index.parent / name for name in names]


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"`source` has a file that cannot be read: {path}: {error} Fetch the file again.") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"`source` must hold tensors by name, got something else in {path}. Save the `state_dict`.")
    return tensors
