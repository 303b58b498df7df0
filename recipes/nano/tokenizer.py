"""The nano's tokenizer: byte-level BPE with Qwen's splitting rule (single digits, contractions, runs of letters).

Using the family's own rule matters: loaders that map a Qwen folder to their built-in tokenizer class then give the same
ids as tokenizer.json. English gets most of the training text, so that most English words are one token.
"""

import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipes.nano.data import Text

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """{%- for message in messages -%}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{%- for part in message.content -%}
{%- if part.type == 'image' or part.image is defined -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or part.video is defined -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{% endif %}<|im_end|>
{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def train_tokenizer(texts: list[Text], vocabulary: int, foreign_share: float, seed: int) -> PreTrainedTokenizerFast:
    """`foreign_share`: characters of other languages, as a share of the English characters."""
    english = [t.text for t in texts if t.language == "en"]
    foreign = [t.text for t in texts if t.language != "en"]
    random.Random(seed).shuffle(foreign)
    budget = foreign_share * sum(map(len, english))
    while foreign and sum(map(len, foreign)) > budget:
        foreign = foreign[: int(len(foreign) * 0.9)]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(english + foreign, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="left",
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_or_train_tokenizer(folder: Path, texts: list[Text], vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer of an earlier run of the same work folder, else a new one, which is kept there."""
    if not folder.exists():
        train_tokenizer(texts, vocabulary, foreign_share=0.12, seed=seed).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)
