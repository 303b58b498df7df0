"""Pictures with a raw text and a synthetic caption, weighted by how well the three agree (ALIP, arXiv 2308.08428).

L = mean_i w_i ( a_i InfoNCE both ways(x, t)_i + b_i InfoNCE both ways(x, c)_i )

x are queries, t their positives, c synthetic captions (the second positive of a record). Weights, without gradient:
- w_i = min(1, e^{(s(t_i, c_i) - H_tc)}^gamma): below 1 where text and caption disagree more than usual;
- a_i = e^{(s(x_i, t_i) - H_xt)}^gamma and b_i alike with c where w_i is below 1, else 1.
H are running means (.99, first 1) of each similarity over batches, updated before they are used, and saved; all
similarities are cosines. Cost: (N, N) floats four times.

When: pictures come with a noisy text of the web and a synthetic caption, and neither can be trusted alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.memory import KeyedRows
from mmembed.objectives.softmax import both_ways
from mmembed.registry import Above0, Below1


class ALIP(Aligned):
    """InfoNCE with a text and a caption of the query, each pair weighted by the agreement of the three.

    Args:
        temperature: 0.07 (CLIP's start).
        gamma: sharpness of the weights, 2 in the authors' code.
        decay: of the running means, 0.99.
    """

    name = "alip"
    least_pairs = 2
    contrasts = True
    positives_needed = 2
    by_place = True

    def __init__(
        self,
        temperature: Above0 = 0.07,
        gamma: Above0 = 2.0,
        decay: Below1 = 0.99,
    ) -> None:
        super().__init__()
        self.temperature, self.gamma, self.decay = temperature, gamma, decay
        self.means = KeyedRows(3)  # by the size of the vectors, which matryoshka cuts

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        x, text, caption = pairs.unit_views
        sample, raw, synthetic = gates(agreement(pairs.unit_views), self._means(pairs), self.gamma)
        of_text = both_ways(x @ text.T / self.temperature, pairs.same)  # (N,)
        of_caption = both_ways(x @ caption.T / self.temperature, pairs.same)
        loss = (sample * (raw * of_text + synthetic * of_caption)).mean()
        return loss, {"sample_weight": sample.mean(), "text_weight": raw.mean(), "caption_weight": synthetic.mean()}

    def news(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        return self._key(pairs), self._means(pairs).unsqueeze(0)

    def keep(self, news: tuple[Tensor, Tensor]) -> None:
        self.means.put(*news)

    def _key(self, pairs: Pairs) -> Tensor:
        return torch.tensor([pairs.queries.shape[1]], device=pairs.queries.device)

    def _means(self, pairs: Pairs) -> Tensor:
        """(3,) running means with this batch in them."""
        before, known = self.means.find(self._key(pairs))
        before = torch.where(known, before[0], 1.0)
        return self.decay * before + (1 - self.decay) * agreement(pairs.unit_views).mean(1)


def agreement(views: Tensor) -> Tensor:
    """Unit vectors (3, N, E) of query, text, caption -> (3, N) without gradient: text-caption, query-text and
    query-caption."""
    x, text, caption = views.detach()
    return torch.stack([(text * caption).sum(1), (x * text).sum(1), (x * caption).sum(1)])


def gates(agreements: Tensor, means: Tensor, gamma: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """(3, N), (3,) -> weights of samples, texts and captions, (N,) each.

    >>> [gate.tolist() for gate in gates(torch.tensor([[1.0], [0.0], [0.0]]), torch.zeros(3))]
    [[1.0], [1.0], [1.0]]
    """
    found = (gamma * (agreements - means[:, None])).exp()  # (3, N)
    sample = found[0].clamp_max(1)
    agrees = sample >= 1
    return sample, torch.where(agrees, 1.0, found[1]), torch.where(agrees, 1.0, found[2])
