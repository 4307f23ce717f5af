"""Conversion of drafts in the layout of the published `sail/longspec-*` checkpoints to this package's format.

That layout is the same decoder layer under the same tensor names, beside the target's own configuration. It differs in
five things: the cross-attention's k and v projections are there but unused; q, k and v may have biases whatever the
configuration says; the target's final norm is not applied; a window of 512 means the keys p - 512 .. p; and the names
may have a prefix.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .checkpoint_files import checkpoint_folder, read_tensors
from .configuration_longspec import LongSpecDraftConfig
from .modeling_longspec import LongSpecDraftModel
from .published import published_target

logger = logging.get_logger(__name__)

PUBLISHED_WINDOW = 512
UNUSED = tuple(f"cross_attn.{name}_proj.{kind}" for name in "kv" for kind in ("weight", "bias"))
NAMED_AT_MOST = 8  # faults in one message


def convert_checkpoint(
    source: str | os.PathLike,
    target: PreTrainedModel | PreTrainedConfig | str | os.PathLike | None = None,
    output_dir: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    window: int = PUBLISHED_WINDOW,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> LongSpecDraftModel:
    """Convert a draft in the published layout, and save it if `output_dir` is given.

    Args:
        source: folder or Hub repository of the draft: safetensors or `.bin` (loaded with `weights_only`), one file or
            shards with their index.
        target: the model the draft was trained for, or its configuration, folder or Hub repository. By default the
            `config.json` beside the draft, which in this layout is the target's.
        output_dir: folder to save the draft in; it must be empty or not there yet. It appears complete or not at all.
        revision: of `source` on the Hub.
        dtype: of the converted draft, a floating-point `torch.dtype` or its name. By default the checkpoint's.
        window: the checkpoint's self-attention window in its own counting, tokens before the query. The converted
            draft's `sliding_window`, which counts the query's own key too, is one more.
        cache_dir, local_files_only: where the Hub's files are kept, and whether to use only those.

    Returns:
        The draft, on the CPU and in evaluation mode.

    Raises:
        ValueError: an argument is wrong, or the checkpoint does not fit the target; the message names each tensor with
            the shape that was expected and the one that came.
    """
    dtype = _floating_dtype(dtype)
    if type(window) is not int or window < 1:
        raise ValueError(f"`window` must be an integer of at least 1, got {window!r}. The published drafts have 512.")
    output = None if output_dir is None else _free_folder(Path(output_dir))
    folder = checkpoint_folder(source, revision, cache_dir, local_files_only)
    target_config = _target_config(target, folder, cache_dir=cache_dir, local_files_only=local_files_only)
    tensors = without_prefix(read_tensors(folder), where=str(source))
    dropped = [name for name in UNUSED if tensors.pop(name, None) is not None]
    overrides = {"target_name_or_path": published_target(str(source))} if target is None else {}
    config = LongSpecDraftConfig.from_target(
        target_config,
        attention_bias=any(name.endswith("_proj.bias") for name in tensors),
        qk_norm=False,
        sliding_window=window + 1,
        use_target_final_norm=False,
        **overrides,
    )
    with torch.device("meta"):
        draft = LongSpecDraftModel(config).eval()
    expected = {name: value.shape for name, value in draft.state_dict().items()}
    added = _add_zero_biases(tensors, expected)
    check_fit(tensors, expected, where=str(source))
    draft.load_state_dict(_cast(tensors, dtype), assign=True)
    if dropped:
        logger.info("Dropped tensors that no output depends on: %s.", ", ".join(dropped))
    if added:
        logger.warning("Set absent biases to zero, as the original code does: %s.", ", ".join(added))
    if output is not None:
        _save(draft, output)
    return draft


def without_prefix(tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """The tensors by the names of one LongSpec layer; a prefix such as `draft_model.` that they share is cut off.

    Raises:
        ValueError: no tensor has the name of one of the layer's, or they have several prefixes.
    """
    with torch.device("meta"):
        layer = LongSpecDraftModel(LongSpecDraftConfig(attention_bias=True, qk_norm=False)).state_dict()
    suffixes = [*layer, *UNUSED]
    prefixes = {name.removesuffix(end) for name in tensors for end in suffixes if ("." + name).endswith("." + end)}
    if not prefixes:
        raise ValueError(
            f"`source` ({where}) must hold a draft in the published LongSpec layout (`self_attn.q_proj.weight`, "
            f"`cross_attn.q_proj.weight`, ...), got {_some(sorted(tensors), 'no tensor')}."
        )
    if len(prefixes) > 1:
        raise ValueError(
            f"`source` ({where}) must hold one draft layer, got layers under the prefixes "
            f"{_some(repr(prefix) for prefix in sorted(prefixes))}. Save the draft's tensors without the target's."
        )
    prefix = prefixes.pop()
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def check_fit(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Size], where: str) -> None:
    """Check that there is every expected tensor of its shape and no other; dtypes must be floating-point.

    Raises:
        ValueError: the message names each tensor that does not fit.
    """
    faults = [
        f"missing tensor `{name}` of shape {tuple(shape)}" for name, shape in expected.items() if name not in tensors
    ]
    for name, value in tensors.items():
        if name not in expected:
            faults.append(f"unknown tensor `{name}` of shape {tuple(value.shape)}")
        elif value.shape != expected[name]:
            faults.append(f"tensor `{name}` has shape {tuple(value.shape)}, expected {tuple(expected[name])}")
        elif not value.is_floating_point():
            faults.append(f"tensor `{name}` has dtype {value.dtype}, expected a floating-point one")
    if faults:
        raise ValueError(
            f"`source` ({where}) does not hold a LongSpec draft of this target: {_some(faults, separator='; ')}. Pass "
            "the target that the draft was trained for as `target`, or fetch the checkpoint again."
        )


def _target_config(
    target: PreTrainedModel | PreTrainedConfig | str | os.PathLike | None, folder: Path, **hub: Any
) -> PreTrainedConfig:
    if isinstance(target, (PreTrainedModel, PreTrainedConfig)):
        config = target.config if isinstance(target, PreTrainedModel) else target
    else:
        try:
            config = AutoConfig.from_pretrained(folder if target is None else target, **hub)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`target` must be a model, its configuration, its folder or its Hub repository, got {target!r}"
                f"{f' and no configuration of a model in {folder}' if target is None else ''}: {error}"
            ) from error
    if isinstance(config, LongSpecDraftConfig):
        raise ValueError(
            f"`{'source' if target is None else 'target'}` must not be a converted draft, got a configuration of type "
            "`longspec`. Load such a draft with `LongSpecDraftModel.from_pretrained`; no conversion is needed."
        )
    return config


def _floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"`dtype` must be a floating-point type such as torch.bfloat16 or its name, got {dtype!r}.")
    return found


def _add_zero_biases(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Size]) -> list[str]:
    """Put zeros for the biases that are absent where others are there; returns their names."""
    absent = [name for name in expected if name.endswith("_proj.bias") and name not in tensors]
    absent = [name for name in absent if name.replace(".bias", ".weight") in tensors]
    for name in absent:
        tensors[name] = tensors[name.replace(".bias", ".weight")].new_zeros(expected[name])
    return absent


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    dtypes = {value.dtype for value in tensors.values()}
    if dtype is None and len(dtypes) > 1:
        raise ValueError(
            f"`dtype` must be given for a checkpoint of several dtypes, got {_some(sorted(map(str, dtypes)))}. Give "
            "that of the target."
        )
    return {name: value.to(dtype or value.dtype).contiguous() for name, value in tensors.items()}


def _free_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`output_dir` must be empty or not there yet, got {folder}. Choose another or remove it.")
    return folder


def _save(draft: LongSpecDraftModel, folder: Path) -> None:
    """Save beside the place and rename when complete, so that an interrupted call leaves nothing half-written."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch) / folder.name
        draft.save_pretrained(made)
        if folder.exists():
            folder.rmdir()
        made.rename(folder)


def _some(items: Iterable[str], nothing: str = "nothing", separator: str = ", ") -> str:
    items = list(items)
    rest = len(items) - NAMED_AT_MOST
    more = [f"{rest} more"] if rest > 0 else []
    return separator.join([*items[:NAMED_AT_MOST], *more]) or nothing
