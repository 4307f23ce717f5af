"""Sampling: equal seeds give plain `generate`'s ids; the distribution is the target's; processors see one path."""

import pytest
import torch
from models import VOCAB, ScriptedDraft, learned, prompt, scripted, tiny_target
from scipy.stats import chi2_contingency, chisquare
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from longspec_hf.text import TextBuffer, TokenDrawer, draw_one
from longspec_hf.verification import walk

NEW_TOKENS = 24
P_VALUE = 1e-3  # of each chi-square test; draws are seeded, so a pass stays a pass

SETTINGS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8, "top_k": 0},
    "min_p": {"min_p": 0.2, "top_k": 0},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[11], *([a, b] for a in range(VOCAB) for b in range(a % 8, VOCAB, 8))]},
    "prefix_allowed": {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(len(ids) % 3, VOCAB, 3))},
    "together": {"temperature": 0.7, "top_k": 8, "top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("size", [1, 7, 1000, 49152])
def test_one_draw_is_multinomials_and_takes_as_many_random_numbers(size):
    probabilities = torch.softmax(3 * torch.randn(1, size, generator=torch.Generator().manual_seed(size)), dim=-1)
    probabilities[0, 1:-1:2] = 0.0  # what a processor has masked
    for seed in range(30):
        torch.manual_seed(seed)
        expected = int(torch.multinomial(probabilities, num_samples=1)), torch.rand(1)
        torch.manual_seed(seed)
        assert (draw_one(probabilities), torch.rand(1)) == expected


@pytest.mark.parametrize("bad", [float("nan"), -1.0], ids=["nan", "negative"])
def test_no_draw_from_what_is_no_distribution(bad):
    with pytest.raises(RuntimeError, match="probability tensor"):
        draw_one(torch.tensor([[bad, bad, bad]]))


@pytest.mark.parametrize("name", SETTINGS)
def test_seed_for_seed(target, name):
    ids = prompt(12, seed=1)
    rounds = accepted = 0
    for seed in range(6):
        kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": True, **SETTINGS[name]}
        torch.manual_seed(seed)
        plain = target.generate(ids, **kwargs)
        after_plain = torch.rand(1)
        # Knows about half of this seed's text, so that few seeds leave the tree anywhere.
        draft = ScriptedDraft(target, plain, "noisy", tree_shape=[3, 3])
        torch.manual_seed(seed)
        out = target.generate(ids, assistant_model=draft, return_dict_in_generate=True, **kwargs)
        assert torch.equal(plain, out.sequences), seed
        assert torch.equal(after_plain, torch.rand(1)), "the random stream was read more or less often"
        rounds += out.speculation_stats.rounds
        accepted += sum(out.speculation_stats.accepted_per_depth)
    assert 0 < accepted < 2 * rounds  # of the two levels


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_with_processors(target, name):  # C20, C41, C42
    ids = torch.cat([prompt(6, seed=2)] * 3, dim=1)
    kwargs = {"max_new_tokens": 40, "do_sample": False, **SETTINGS[name]}
    kwargs = {k: v for k, v in kwargs.items() if k not in ("temperature", "top_k", "top_p", "min_p")}
    plain = target.generate(ids, **kwargs)
    for mode in ("oracle", "noisy"):
        draft = ScriptedDraft(target, plain, mode, ngram_branch_length=5)
        out = target.generate(ids, assistant_model=draft, return_dict_in_generate=True, **kwargs)
        assert torch.equal(plain, out.sequences)
        assert out.speculation_stats.tau > 1


def toy():
    """A vocab-8 target whose next-token distribution is spread out."""
    return tiny_target(vocab_size=8, initializer_range=0.2, seed=3)


def extended(ids, token):
    return torch.cat([ids, torch.tensor([[token]])], dim=1)


@torch.no_grad()
def exact_pairs(model, ids, warp=lambda ids, scores: scores):
    """`[8, 8]` probability of the next two tokens."""
    first = warp(ids, model(ids).logits[:, -1]).softmax(-1)[0]
    rows = []
    for token in range(8):
        longer = extended(ids, token)
        rows.append(first[token] * warp(longer, model(longer).logits[:, -1]).softmax(-1)[0])
    return torch.stack(rows)


CANDIDATES = {"none": [], "one": [0], "some": [0, 3, 5], "all": list(range(8))}


@pytest.mark.parametrize(
    ("candidates", "warped"), [*((name, False) for name in CANDIDATES), ("some", True), ("all", True)]
)
def test_distribution_is_the_targets(candidates, warped):  # C14, C15, C16, C18
    """10 000 pairs of tokens drawn by the walk over trees that hold none, one, some or all first tokens.

    With processors, which take long, over the tree with some of the first tokens and the one with all.
    """
    model, ids = toy(), torch.tensor([[1, 5, 2]])
    warp = LogitsProcessorList()
    if warped:
        warp += [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7)]
        warp += [TopKLogitsWarper(3), TopPLogitsWarper(0.8)]
    expected = exact_pairs(model, ids, warp).flatten()
    with torch.no_grad():
        after = torch.cat([model(ids).logits[:, -1], *(model(extended(ids, i)).logits[:, -1] for i in range(8))])
    nodes = CANDIDATES[candidates]
    generation_config = GenerationConfig(do_sample=True, return_dict_in_generate=False)
    draws, counts = 10_000, torch.zeros(64)
    torch.manual_seed(0)
    for _ in range(draws):
        drawer = TokenDrawer(TextBuffer(ids), warp, StoppingCriteriaList([StopAtFive()]), generation_config)

        def draw(node, drawer=drawer):
            return drawer.draw(after[0 if node == 0 else nodes[node - 1] + 1].unsqueeze(0))

        walk([2, *nodes], [0] * (1 + len(nodes)), draw)
        first, *rest = drawer.text.ids[0, 3:].tolist()
        second = rest[0] if rest else drawer.draw(after[first + 1].unsqueeze(0))[0]
        counts[first * 8 + second] += 1
    assert counts[expected == 0].sum() == 0
    # Cells with a small expectation are pooled, as the chi-square approximation asks.
    large = (expected * draws) >= 5
    observed = torch.cat([counts[large], counts[~large].sum().view(1)])
    wanted = torch.cat([expected[large], expected[~large].sum().view(1)])
    keep = wanted > 0
    assert chisquare(observed[keep], wanted[keep] / wanted[keep].sum() * draws).pvalue > P_VALUE


class StopAtFive(StoppingCriteria):
    """A criterion that holds once two tokens follow the prompt of three."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 5])


def test_same_seed_same_ids_other_seed_other_ids(target):  # C21
    ids = prompt(10)
    draft = scripted(target, ids, 8, "noisy")

    def run(seed):
        torch.manual_seed(seed)
        return target.generate(ids, max_new_tokens=8, do_sample=True, top_k=0, temperature=2.0, assistant_model=draft)

    assert torch.equal(run(5), run(5))
    assert sum(not torch.equal(run(0), run(seed)) for seed in range(1, 21)) > 10


def test_successive_calls_go_on_in_the_random_stream(target):  # C22
    ids = prompt(10)
    draft = scripted(target, ids, 30, "noisy")
    kwargs = {"max_new_tokens": 30, "do_sample": True, "temperature": 1.5, "top_k": 0, "assistant_model": draft}
    assert not torch.equal(target.generate(ids, **kwargs), target.generate(ids, **kwargs))


def test_all_but_one_token_masked(target):  # C24
    ids = prompt(8)
    draft = scripted(target, ids, 10, "oracle")
    only = 7
    out = target.generate(
        ids,
        max_new_tokens=10,
        do_sample=True,
        bad_words_ids=[[i] for i in range(VOCAB) if i != only],
        assistant_model=draft,
    )
    assert out[0, 8:].tolist() == [only] * 10


class NanAt(LogitsProcessor):
    """Plants a NaN that `remove_invalid_values` has to clean up behind it."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 3] = float("nan")
        return scores


def test_invalid_values_are_removed_as_in_plain(target):  # C24
    ids = prompt(8)
    kwargs = {
        "max_new_tokens": 12,
        "do_sample": False,
        "remove_invalid_values": True,
        "logits_processor": LogitsProcessorList([NanAt()]),
    }
    plain = target.generate(ids, **kwargs)
    assert torch.equal(plain, target.generate(ids, assistant_model=scripted(target, ids, 12, "noisy"), **kwargs))


def test_equal_probabilities_never_raise():  # C24
    model = tiny_target(vocab_size=1000)
    torch.nn.init.zeros_(model.lm_head.weight)
    ids = prompt(4, vocab=1000)
    draft = ScriptedDraft(model, ids, "wrong", tree_shape=[2])
    torch.manual_seed(0)
    out = model.generate(ids, max_new_tokens=300, do_sample=True, top_k=0, assistant_model=draft)
    counts = torch.bincount(out[0, 4:] // 100, minlength=10)
    assert chisquare(counts).pvalue > P_VALUE


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_banned_token_never_appears(do_sample):  # C20
    """200 tokens of 20 prompts, whose most likely next token is banned while the draft proposes every token."""
    model = tiny_target(vocab_size=32)
    prompts = torch.cat([prompt(10, seed=seed, vocab=32) for seed in range(1000)])
    likeliest = model(prompts).logits[:, -1].argmax(-1)
    banned = int(likeliest.mode().values)
    prompts = prompts[likeliest == banned][:20]
    assert len(prompts) == 20
    draft = learned(model, tree_shape=[32], max_tree_nodes=33, ngram_branch_length=0)
    kwargs = {"max_new_tokens": 200, "sequence_bias": {(banned,): -100.0}}
    plain = model.generate(prompts, do_sample=False, **kwargs)
    kwargs |= {"do_sample": True, "min_p": 0.2} if do_sample else {"do_sample": False}
    for first, rows in ((0, 1), (1, 19)):  # one row alone; the others together, which takes less time
        torch.manual_seed(first)
        ids = prompts[first : first + rows]
        out = model.generate(ids, assistant_model=draft, return_dict_in_generate=True, **kwargs)
        assert out.sequences.shape == (rows, 210)
        assert not (out.sequences[:, 10:] == banned).any()
        assert do_sample or torch.equal(plain[first : first + rows], out.sequences)
        assert out.speculation_stats.tau > 1.9  # two tokens a round, one drawn at the root and one behind a node


class BanEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.arange(0, VOCAB, 2), float("-inf"))


@pytest.mark.parametrize("do_sample", [False, True])
def test_user_processors_hold_at_every_depth(target, do_sample):  # C39
    ids = prompt(10)
    kwargs = {"max_new_tokens": 100, "do_sample": do_sample, "logits_processor": LogitsProcessorList([BanEven()])}
    torch.manual_seed(0)
    plain = target.generate(ids, **kwargs)
    draft = ScriptedDraft(target, plain, "oracle", tree_shape=[2] * 5)
    torch.manual_seed(0)
    out = target.generate(ids, assistant_model=draft, return_dict_in_generate=True, **kwargs)
    assert (out.sequences[0, 10:] % 2 == 1).all()
    assert len(out.speculation_stats.accepted_per_depth) == 5
    assert torch.equal(plain, out.sequences)


def test_balanced_brackets_stay_legal(target):  # C42
    opening, closing = 10, 11

    def allowed(batch, ids):
        text = ids.tolist()
        depth = text.count(opening) - text.count(closing)
        return [opening] + [closing] * (depth > 0)

    ids = torch.tensor([[opening, opening]])
    kwargs = {"max_new_tokens": 40, "do_sample": False, "prefix_allowed_tokens_fn": allowed}
    plain = target.generate(ids, **kwargs)
    for script in (plain, prompt(42)):  # the second proposes illegal children all the time
        assert torch.equal(
            plain, target.generate(ids, assistant_model=ScriptedDraft(target, script, "oracle"), **kwargs)
        )


class Spy(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        assert input_ids.dim() == 2 and scores.shape == (1, VOCAB)
        self.seen.append(input_ids[0].tolist())
        return scores


def test_processors_are_called_once_per_committed_position(target):  # C43
    ids = prompt(10)
    spy = Spy()
    draft = scripted(target, ids, 30, "noisy")
    out = target.generate(
        ids, max_new_tokens=30, do_sample=False, assistant_model=draft, logits_processor=LogitsProcessorList([spy])
    )
    text = out[0].tolist()
    assert spy.seen == [text[:n] for n in range(10, 40)]


def test_acceptance_does_not_depend_on_the_draft(target):
    """First sampled tokens are distributed alike whichever draft proposes."""
    ids = prompt(6)
    table = torch.zeros(2, VOCAB)
    for row, mode in enumerate(("oracle", "wrong")):
        draft = scripted(target, ids, 4, mode, tree_shape=[2])
        torch.manual_seed(row)
        for _ in range(150):
            table[
                row, target.generate(ids, max_new_tokens=2, do_sample=True, top_k=6, assistant_model=draft)[0, 7]
            ] += 1
    table = table[:, table.sum(0) >= 10]
    assert chi2_contingency(table).pvalue > P_VALUE


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_sampled_texts_are_as_likely_as_plains(target, temperature):  # C19
    """Mean log-probability under the target of 200 texts each, sampled with other random numbers."""
    ids = prompt(10)
    means, variances = [], []
    for seed, assistant in ((0, {}), (1, {"assistant_model": scripted(target, ids, 16, "noisy")})):
        torch.manual_seed(seed)
        kwargs = {"max_new_tokens": 16, "do_sample": True, "temperature": temperature, "top_p": 0.9, "top_k": 0}
        texts = target.generate(ids, num_return_sequences=200, **kwargs, **assistant)
        with torch.no_grad():
            logprobs = target(texts).logits[:, 9:-1].log_softmax(-1)
        totals = logprobs.gather(-1, texts[:, 10:, None]).sum((1, 2))
        means.append(totals.mean())
        variances.append(totals.var() / len(totals))
    assert abs(means[0] - means[1]) < 3 * sum(variances) ** 0.5
