"""Hybrid tree attention for speculative decoding over long contexts, and the fused steps around it.

Every kernel has a plain-PyTorch twin.

Importing needs PyTorch only; Triton and flash-attn are used where they are installed.
"""

from .api import hybrid_tree_attention
from .commit_rows import RowMover
from .fused_beam import best_children_fused
from .fused_children import append_children
from .fused_gate import silu_and_multiply
from .fused_linear import few_rows_fit, gated_linear, linear_add_rms_norm, linear_few_rows
from .fused_norm import add_rms_norm, embed_rms_norm
from .fused_projection import project_rotate, project_rotate_and_store, projections_fit
from .fused_rotary import rotate, rotate_and_store
from .fused_state import advance, rotary_rows
from .fused_tree import ancestor_matrix, level_depths, merge_nodes, merge_tree
from .fused_walk import greedy_walk
from .masks import pack_ancestor_bits, unpack_ancestor_bits
from .reference import hybrid_tree_attention_reference

__all__ = [
    "RowMover",
    "add_rms_norm",
    "advance",
    "ancestor_matrix",
    "append_children",
    "best_children_fused",
    "embed_rms_norm",
    "few_rows_fit",
    "gated_linear",
    "greedy_walk",
    "hybrid_tree_attention",
    "hybrid_tree_attention_reference",
    "level_depths",
    "linear_add_rms_norm",
    "linear_few_rows",
    "merge_nodes",
    "merge_tree",
    "pack_ancestor_bits",
    "project_rotate",
    "project_rotate_and_store",
    "projections_fit",
    "rotary_rows",
    "rotate",
    "rotate_and_store",
    "silu_and_multiply",
    "unpack_ancestor_bits",
]
