"""Rounds without Python between their kernels: fused forwards of target and draft, captured as CUDA graphs."""

from .rounds import Engine
from .support import ENGINE_DEVICES, reason_against_engine

__all__ = ["ENGINE_DEVICES", "Engine", "reason_against_engine"]
