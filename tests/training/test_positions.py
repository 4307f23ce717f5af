"""Anchor-offset positions and batches, by hand (C88)."""

import pytest
import torch

from longspec_hf.training import AnchorOffsetCollator, anchor_offset_positions, draw_anchor_offset


def test_anchors_keep_their_positions():
    assert anchor_offset_positions(8, 3, 17000).tolist() == [0, 1, 2, 17003, 17004, 17005, 17006, 17007]
    assert anchor_offset_positions(6, 4, 29960).tolist() == [0, 1, 2, 3, 29964, 29965]
    assert anchor_offset_positions(4, 0, 5).tolist() == [5, 6, 7, 8]
    assert anchor_offset_positions(3, 4, 100).tolist() == [0, 1, 2]


def test_draws_reach_both_ends_and_no_further():
    generator = torch.Generator().manual_seed(0)
    draws = [draw_anchor_offset(10, 14, generator) for _ in range(300)]
    assert {anchors for anchors, _ in draws} == {0, 1, 2, 3, 4}
    assert {offset for _, offset in draws} == {0, 1, 2, 3, 4}
    assert draw_anchor_offset(10, 10, generator)[1] == 0


def test_batch_by_hand():
    batch = AnchorOffsetCollator(pad_token_id=7)([{"input_ids": [1, 2, 3]}, {"input_ids": [4], "labels": [-100]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["labels"].tolist() == [[1, 2, 3], [-100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_rows_have_offsets_of_their_own_within_the_context():
    collator = AnchorOffsetCollator(max_position=1000)
    positions = collator([{"input_ids": list(range(10))}] * 50)["position_ids"]
    assert len({tuple(row) for row in positions.tolist()}) > 40
    assert positions.max() < 1000
    assert (positions[:, 5:].diff(dim=1) == 1).all()


def test_offsets_depend_on_the_number_of_batches_alone():
    rows = [{"input_ids": list(range(10))}]
    straight = AnchorOffsetCollator(max_position=500, seed=3)
    expected = [straight(rows)["position_ids"].tolist() for _ in range(6)]
    resumed = AnchorOffsetCollator(max_position=500, seed=3)
    resumed(rows)
    resumed.set_batches_drawn(4)
    assert [resumed(rows)["position_ids"].tolist() for _ in range(2)] == expected[4:]
    assert len({str(batch) for batch in expected}) == 6


@pytest.mark.parametrize(
    "row, message",
    [
        ({"input_ids": []}, r"`input_ids` of row 0 is empty"),
        ({"input_ids": [1, 2], "labels": [1]}, r"`labels` of row 0 has 1 entries, expected 2"),
        ({"input_ids": list(range(9))}, r"`input_ids` has 9 tokens, more than the 8 positions"),
    ],
)
def test_bad_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        AnchorOffsetCollator(max_position=8)([row])
