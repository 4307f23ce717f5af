"""A target whose weights are sharded over processes (transformers' `tp_plan`), with the whole draft in each.

A process's cache holds its K/V heads only. The draft's cross-attention runs over these with the query heads they
serve, and the heads' outputs, `[B, Hq, T, D]` for the few nodes of a level, are gathered: K/V stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from .configuration_longspec import LongSpecDraftConfig


@dataclass(frozen=True)
class TensorParallel:
    """The processes that share a target.

    Attributes:
        group: their process group.
        size: how many they are.
        rank: this one's place among them.
        device: where its collectives take their tensors.
    """

    group: Any
    size: int
    rank: int
    device: torch.device

    @classmethod
    def of(cls, target: PreTrainedModel, config: LongSpecDraftConfig) -> TensorParallel | None:
        """The processes over which the heads of `target` are sharded, `None` if its forwards compute them all.

        Raises:
            ValueError: the heads cannot be shared out evenly.
        """
        if is_sharded_by_fsdp(target):
            return None
        weights = (parameter for parameter in target.get_decoder().parameters() if isinstance(parameter, DTensor))
        for weight in weights:
            for dim, placement in enumerate(weight.placements):
                size = weight.device_mesh.size(dim)
                if isinstance(placement, Shard) and size > 1:
                    _check_heads(config, size)
                    mesh = weight.device_mesh
                    return cls(mesh.get_group(dim), size, mesh.get_local_rank(dim), weight.to_local().device)
        return None

    def attend(self, attend: Callable[[torch.Tensor], torch.Tensor], query: torch.Tensor) -> torch.Tensor:
        """`attend` of this process's share of the heads of `query` `[B, Hq, T, D]`, joined with the others' shares."""
        own = attend(query.chunk(self.size, dim=1)[self.rank]).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts, dim=1)

    def agree(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The first process's integers or booleans in place of everyone's own, which have the same shapes."""
        packed = torch.stack([tensor.long() for tensor in tensors])
        dist.broadcast(packed, group=self.group, group_src=0)
        return [agreed.to(tensor.dtype) for agreed, tensor in zip(packed, tensors, strict=True)]

    def agree_on_seconds(self, seconds: float) -> float:
        """The first process's time."""
        return float(self.agree([torch.tensor([int(seconds * 1e9)], device=self.device)])[0]) / 1e9


def is_sharded_by_fsdp(target: nn.Module) -> bool:
    """Whether FSDP2 has sharded weights of `target`, which a forward gathers: its heads and its text are whole."""
    return any(isinstance(module, FSDPModule) for module in target.modules())


def _check_heads(config: LongSpecDraftConfig, size: int) -> None:
    if config.num_key_value_heads % size or config.num_attention_heads % size:
        raise ValueError(
            f"`num_attention_heads` and `num_key_value_heads` of the target ({config.num_attention_heads} and "
            f"{config.num_key_value_heads}) must be multiples of the {size} processes it is sharded over. Use fewer "
            "processes, or `device_map` in one."
        )
