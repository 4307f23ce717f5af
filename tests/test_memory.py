"""What the draft costs in memory and prefill does not depend on the length of the text."""

import torch
from models import ScriptedDraft, learned, prompt

from longspec_hf import LongSpecDraftModel
from longspec_hf.draft_window import DraftWindow
from longspec_hf.hook import CACHE_ARG


def generate(target, draft, length, new_tokens=4):
    return target.generate(
        prompt(length), max_new_tokens=new_tokens, do_sample=False, assistant_model=draft, return_dict_in_generate=True
    )


def test_draft_bytes_are_equal_at_every_length(target):  # C69, promise 2
    draft = learned(target)
    sizes = {generate(target, draft, length)[CACHE_ARG].draft_window.nbytes for length in (8, 1000, 4000, 16_000)}
    assert len(sizes) == 1


def test_prompt_past_the_drafts_window_and_the_draft_keeps_up(target):  # C69
    draft = learned(target, sliding_window=32)
    ids = prompt(4000)
    plain = target.generate(ids, max_new_tokens=300, do_sample=False)
    draft = ScriptedDraft(target, plain, "noisy", sliding_window=32)
    out = generate(target, draft, 4000, 300)
    assert torch.equal(out.sequences, plain)
    assert out.speculation_stats.tau > 1.5


def test_prefill_projects_the_window_only(target, monkeypatch):  # promise 3
    draft = learned(target, sliding_window=16)
    projected = []
    original = LongSpecDraftModel.window_keys_values

    def counted(self, inputs_embeds, cos, sin):
        projected.append(inputs_embeds.shape[1])
        return original(self, inputs_embeds, cos, sin)

    monkeypatch.setattr(LongSpecDraftModel, "window_keys_values", counted)
    generate(target, draft, 2000, 1)
    assert projected == [16]


def test_round_one_is_conditioned_on_the_last_prompt_token(target):  # C53
    """Draft and target rows at the first proposal end with the prompt's last token."""
    draft = learned(target, sliding_window=8, tree_shape=[2])
    ids = prompt(30)
    lengths = []
    original = draft.next_token_logits

    def spy(hidden, head, token_ids, position_ids):
        lengths.append(int(position_ids))
        return original(hidden, head, token_ids, position_ids)

    draft.next_token_logits = spy
    out = generate(target, draft, 30, 3)
    assert lengths[0] == 30  # the root is the first new token
    window = out[CACHE_ARG].draft_window
    bound_embeds = target.get_input_embeddings()(ids[:, -8:])
    cos, sin = target.model.rotary_emb(bound_embeds, torch.arange(22, 30).unsqueeze(0))
    keys, _ = draft.window_keys_values(bound_embeds, cos, sin)
    torch.testing.assert_close(window.keys[:, :, :8], keys)


def test_first_round_accepts_as_later_ones(target):  # C53
    ids = prompt(30)
    plain = target.generate(ids, max_new_tokens=33, do_sample=False)
    draft = ScriptedDraft(target, plain, "oracle", tree_shape=[1] * 3)
    stats = target.generate(
        ids, max_new_tokens=5, do_sample=False, assistant_model=draft, return_dict_in_generate=True
    ).speculation_stats
    assert stats.rounds == 1 and stats.committed == 5


def test_a_window_has_room_for_a_path_longer_than_itself():
    window = DraftWindow(4, 11, (1, 1, 1), torch.float32, torch.device("cpu"))
    for _ in range(5):
        window.make_room(1, 9)
        held = window.row_lengths[0]
        rows = torch.arange(held, held + 9).float().view(1, 1, 9, 1)
        window.write_tree(0, rows, rows)  # of which all are committed
        window.advance([9])
    assert window.keys[0, 0, window.row_lengths[0] - 9 : window.row_lengths[0], 0].tolist() == rows.flatten().tolist()
    assert window.row_lengths[0] <= 2 * 4 + 11


def test_window_keeps_the_last_rows_in_order():
    window = DraftWindow(4, 2, (1, 1, 1), torch.float32, torch.device("cpu"))
    pointer, held = window.keys.data_ptr(), []
    for step in range(1, 40):
        rows = torch.arange(len(held), len(held) + step % 7).float().view(1, 1, -1, 1)
        held += rows.flatten().tolist()
        window.append(rows, -rows, [step % 7])
        length = int(window.lengths[0])
        kept = window.keys[0, 0, :length, 0].tolist()
        assert kept == held[len(held) - len(kept) :]
        assert len(kept) >= min(4, len(held))
        assert torch.equal(window.values, -window.keys)
    assert window.keys.data_ptr() == pointer
    window.write_tree(1, torch.full((1, 1, 1, 1), 7.0), torch.full((1, 1, 1, 1), 8.0))
    assert window.keys[0, 0, length + 1, 0] == 7 and window.values[0, 0, length + 1, 0] == 8
