"""Drafts in the published layout, made by the independent layer.

`python tests/published_layout.py` writes `tests/data/published_layout/`: a tiny pair and the numbers the independent
layer gives for it, of whole texts only the last rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from independent_layer import IndependentLayer, IndependentNumbers, Sizes, random_checkpoint
from layer_numbers import given_for
from models import tiny_target
from safetensors.torch import save_file
from transformers import LlamaConfig

FOLDER = Path(__file__).parent / "data" / "published_layout"
KEPT_ROWS = 4


def sizes_of(config: LlamaConfig) -> Sizes:
    """What the layer's maths needs of a target's configuration."""
    return Sizes(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
    )


def write_draft(folder: Path, config: LlamaConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a random draft in the published layout for the target of `config`; returns its tensors."""
    tensors = random_checkpoint(sizes_of(config), seed)
    fields = config.to_dict()
    rope = fields.pop("rope_parameters")
    # As transformers 4 wrote it.
    fields |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": fields.pop("dtype")}
    fields["architectures"] = [f"{config.model_type.capitalize()}GlideDecoderLayer"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@torch.no_grad()
def independent_numbers(tensors: dict, target, given: dict) -> dict[str, torch.Tensor]:
    """All quantities of a draft by the independent layer, in the target's dtype."""
    tensors = {name: value.to(target.dtype) for name, value in tensors.items()}
    layer = IndependentLayer(tensors, sizes_of(target.config))
    return IndependentNumbers(layer, target.get_input_embeddings().weight, target.lm_head.weight, given).all()


def main() -> None:
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
    target = tiny_target("llama", max_position_embeddings=32768, **sizes)
    target.save_pretrained(FOLDER / "target")
    tensors = write_draft(FOLDER / "draft", target.config)
    given = given_for(target.double())
    expected = independent_numbers(tensors, target, given)
    kept = {name: value[-KEPT_ROWS:].float() for name, value in expected.items() if not name.endswith("_logits")}
    save_file(kept, FOLDER / "expected.safetensors")
    ids = {name: value.clone() for name, value in given.items() if not value.is_floating_point()}
    save_file(ids, FOLDER / "given.safetensors")


if __name__ == "__main__":
    main()
