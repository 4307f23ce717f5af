"""Hybrid tree attention for speculative decoding over long contexts, with a plain-PyTorch twin.

Importing needs PyTorch only; Triton and flash-attn are used where they are installed.
"""

from .api import hybrid_tree_attention
from .masks import pack_ancestor_bits, unpack_ancestor_bits
from .reference import hybrid_tree_attention_reference

__all__ = [
    "hybrid_tree_attention",
    "hybrid_tree_attention_reference",
    "pack_ancestor_bits",
    "unpack_ancestor_bits",
]
