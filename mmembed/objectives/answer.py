"""Next-token prediction of an in-context reranker's answer: the numbers of the relevant documents.

L_NTP = - sum_t log p(x_t | x_<t) / (number of answer tokens of the global batch)

The first term of BlockRank (arXiv 2510.05396), beside lambda L_aux, which trains the attention that is read:

    objective: [{type: answer}, {type: ranking, loss: infonce, temperature: 0.05, weight: 0.1}]

Without it the attention ranks nearly as well (28.6 against 29.1 P@1), and the model can no longer answer (15.8 against
28.7 decoded).

When: an in-context reranker; always, unless the answer is never decoded.
"""

from __future__ import annotations

from typing import ClassVar

from mmembed.content import Role
from mmembed.objectives.captioning import Captioning


class Answer(Captioning):
    """Predicts the answer behind a list of documents; a part of a list of objectives, for head `attention`."""

    name = "answer"
    judges = True
    answers: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__("documents")

    @property
    def predicts(self) -> frozenset[Role]:
        return frozenset({"document"})
