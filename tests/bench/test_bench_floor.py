"""Bytes a step must read, counted by hand."""

import pytest
import torch
from models import tiny_target

from longspec_hf import LongSpecDraftModel
from longspec_hf.bench.floor import cache_bytes, draft_bytes, target_bytes
from longspec_hf.cache import LongSpecCache
from longspec_hf.target import bind

# Of `models.SIZES`: hidden 32, MLP 64, 4 heads and 2 K/V heads of 8, two layers, 64 tokens; 4 bytes a number.
ATTENTION = 32 * 32 + 2 * 32 * 16 + 32 * 32
MLP = 3 * 32 * 64
LAYER = ATTENTION + MLP + 2 * 32
HEAD = 64 * 32
ROW = 2 * 2 * 8 * 4  # keys and values of a token in one layer, in bytes


@pytest.mark.parametrize("tied", [False, True])
def test_a_forward_reads_all_but_the_embedding_table(tied):
    target = tiny_target(tie_word_embeddings=tied)
    assert target_bytes(target) == 4 * (2 * LAYER + 32 + HEAD)


def test_a_forward_in_bf16_reads_half_of_it():
    assert target_bytes(tiny_target(dtype=torch.bfloat16)) == 2 * (2 * LAYER + 32 + HEAD)


@pytest.fixture
def cache():
    """Two layers with the rows of two sequences, of which 5 and 3 are committed."""
    cache = LongSpecCache()
    cache.reserve(100)
    for index in range(2):
        cache.update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), index)
    cache.begin_rounds(2)
    cache.set_lengths([5, 3])
    return cache


def test_a_forward_reads_the_committed_rows_of_those_that_go_on(cache):
    assert cache_bytes(cache, 2) == 2 * 8 * ROW
    assert cache_bytes(cache, 1) == 2 * 5 * ROW


@pytest.mark.parametrize("draft_vocab_size", [None, 16])
def test_a_level_reads_the_draft_its_rows_of_the_head_and_one_layer(cache, draft_vocab_size):
    target = tiny_target()
    draft = LongSpecDraftModel.from_target(target, draft_vocab_size=draft_vocab_size)
    cross_attention = 2 * 32 * 32
    layer = ATTENTION + cross_attention + MLP + 3 * 32
    head = (draft_vocab_size or 64) * 32
    assert draft_bytes(draft, bind(draft, target), cache, 2) == 4 * (layer + head) + 8 * ROW
