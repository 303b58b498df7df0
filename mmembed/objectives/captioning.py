"""Next-token prediction on the pass that gives the vectors (CoCa, arXiv 2205.01917; COSMO, arXiv 2401.00849).

L = - sum_t log p(x_t | x_<t) / (number of predicted tokens of the global batch)

It stands in a list with an objective that compares vectors; CoCa weighs that 1 and this 2. x_t are the tokens of the
content's texts: instruction, prompt, image tokens, end tokens and padding are read, not predicted; behind an image the
text is its caption. Attention must be causal, or a state has seen what it predicts (CoCa's unimodal and multimodal
halves of a decoder are one here).
Every token weighs the same, whatever the length of its text and however the batch is divided into chunks and processes;
a text that the batch holds twice counts twice, and is encoded once.

The model computes the sum of each input (`mmembed.backbones.output_embedding`, its cost there); this adds them up: one
reduction of two numbers over processes.

When: as a term, where an embedder should also go on being a language model of its documents (captions, passages). Watch
the dev score: it competes with the contrast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mmembed.content import Role
from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import MmembedError
from mmembed.objectives import Objective
from mmembed.objectives.gather import world


@dataclass(frozen=True)
class Told:
    """-log p of this process's inputs (N,), and of all processes: their sum, and how many tokens that are."""

    nll: Tensor
    total: Tensor
    tokens: Tensor


class Captioning(Objective):
    """Predicts the texts of documents or queries from what stands before them; a part of a list.

    The loss of a process is its share: processes' mean is the mean over tokens. Logs `perplexity`, of all processes.

    Args:
        sides: whose texts. Documents by default: the caption of a picture asked for, the passage of a question.
    """

    name = "captioning"
    compares: ClassVar[bool] = False

    def __init__(self, sides: Literal["documents", "queries", "both"] = "documents") -> None:
        super().__init__()
        self.sides = sides
        self.takes_negatives = sides != "queries"  # their texts are predicted as those of positives

    @property
    def predicts(self) -> frozenset[Role]:
        roles: dict[str, set[Role]] = {"documents": {"document"}, "queries": {"query"}}
        return frozenset(roles.get(self.sides, {"query", "document"}))

    def gather(self, queries: Embeddings, documents: Embeddings, labels: BatchLabels) -> Told:
        sides = {"queries": [queries], "documents": [documents]}.get(self.sides, [queries, documents])
        nll = torch.cat([_present(side.nll) for side in sides])  # (N,)
        tokens = torch.cat([_present(side.predicted) for side in sides]).sum()
        both = torch.stack([nll.detach().sum(), tokens.to(nll.dtype)])  # counts to 16 million are exact in float32
        if world()[1] > 1:
            dist.all_reduce(both)
        return Told(nll, both[0], both[1].clamp_min(1.0))  # a batch of pictures alone has nothing to predict

    def compare(self, gathered: Told) -> tuple[Tensor, dict[str, Tensor]]:
        tokens_a_process = gathered.tokens / world()[1]
        return gathered.nll.sum() / tokens_a_process, {"perplexity": (gathered.total / gathered.tokens).exp()}


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise MmembedError("objective 'captioning': the embeddings come without what their tokens cost to predict")
    return tensor
