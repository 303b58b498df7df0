"""What the backbone itself would answer: the logits of two words at the place of the next token.

z_y = w_y . h,  z_n = w_n . h        h the last hidden state, behind the assistant's header

P(yes | yes or no) = sigmoid(z_y - z_n)

w are two rows of the output embedding (GMR, arXiv 2510.14824; Qwen3-Reranker, arXiv 2506.05176), copied into the
checkpoint and frozen unless `trained`, as GMR found unfreezing to help contrastive training alone. The two words must
be one token each.

When: the backbone is an instruction-tuned model, which has an opinion before it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmembed.heads import Head
from mmembed.prompts.judge import two_words


class YesNo(Head):
    """The output embeddings of two words.

    Args:
        words: the answers of a relevant document and of another, exact tokens; quote "yes" and "no" in YAML, which
            reads them as true and false.
        trained: train their rows, too.
    """

    name = "yes_no"
    logits = 2

    def __init__(self, hidden_size: int, words: Sequence[str] = ("yes", "no"), trained: bool = False) -> None:
        super().__init__(hidden_size, trained)
        self._words = two_words("head.words", words)

    @property
    def words(self) -> tuple[str, ...]:
        return self._words
