"""A tiny pair on disk, with a tokenizer of words: what commands, the Hub and an installed wheel load."""

from __future__ import annotations

from pathlib import Path

from models import VOCAB, learned, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<eos>", "system", "user", "assistant"]
WORDS = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCAB))]
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}assistant "


def word_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per word; `w5` is 5."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template=TEMPLATE if chat else None,
    )


def save_tiny_pair(folder: Path, chat: bool = True) -> tuple[Path, Path]:
    """Write `folder/target` and `folder/draft`; the draft is random and has something of everything to save."""
    target = tiny_target(eos_token_id=1, pad_token_id=1)
    target.save_pretrained(folder / "target")
    word_tokenizer(chat).save_pretrained(folder / "target")
    learned(target, draft_vocab_size=32, target_name_or_path="org/target").save_pretrained(folder / "draft")
    return folder / "target", folder / "draft"
