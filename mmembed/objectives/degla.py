"""Global and local alignment: compositional negatives without forgetting (DeGLA, arXiv 2504.16801).

L = L_global + w_i L_IGC + w_t L_TGC over queries x, positives y and the H hard negatives n_ik of each pair:
- L_global: NegCLIP's, InfoNCE of x with all positives and negatives, and of y with all x, averaged;
- L_IGC (image-grounded): -log softmax of x_i.y_i among x_i.y_i and its own negatives x_i.n_ik;
- L_TGC (text-grounded): the same with y_i in the place of x_i, and the teacher's y_i as the positive.

The released TGC masks the wrong negatives (it tiles where they are stored sample by sample); ours is the intended form.
There the teacher is a running mean of the weights (.9996), and the squared distance to it is added (.005, summed). The
trainer holds one model, so our teacher of TGC is the positive's own vector without a gradient, and the distillation
term, which would be 0, is left out: what protects from forgetting is missing. Cost: (N, N (1 + H)) floats.

When: captions have hard negatives of word order or attributes, and what the model knew must stay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.objectives.aligned import Aligned, Pairs
from mmembed.objectives.softmax import info_nce, log_shares
from mmembed.registry import Above0, Weight


class DeGLA(Aligned):
    """NegCLIP's contrast, and each query and positive against its own hard negatives.

    Args:
        temperature: 0.07, of the global and the image-grounded term.
        text_temperature: of the text-grounded term, 0.1.
        image_grounded, text_grounded: weights, 0.1 each in the paper.
    """

    name = "degla"
    least_pairs = 2
    contrasts = True
    takes_negatives = True

    def __init__(
        self,
        temperature: Above0 = 0.07,
        text_temperature: Above0 = 0.1,
        image_grounded: Weight = 0.1,
        text_grounded: Weight = 0.1,
    ) -> None:
        super().__init__()
        self.temperature, self.text_temperature = temperature, text_temperature
        self.image_grounded, self.text_grounded = image_grounded, text_grounded

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = pairs.unit
        negatives, exists = functional.normalize(pairs.negatives, dim=-1), pairs.has_negative
        wrong = ~exists.flatten() | pairs.knows(pairs.negative_keys.flatten(0, 1))  # (N, N H)
        whole = global_term(x, y, negatives, pairs.same, wrong, 1 / self.temperature)
        image = grounded(x, y, negatives, exists, 1 / self.temperature)
        text = grounded(y, y.detach(), negatives, exists, 1 / self.text_temperature)
        loss = whole + self.image_grounded * image + self.text_grounded * text
        return loss, {"global": whole.detach(), "image_grounded": image.detach(), "text_grounded": text.detach()}


def global_term(x: Tensor, y: Tensor, negatives: Tensor, same: Tensor, wrong: Tensor, scale: float) -> Tensor:
    """Unit vectors (N, E), (N, E), (N, H, E); no negatives of a row: (N, N) and (N, N H) bool -> scalar."""
    scores = torch.cat([x @ y.T, x @ negatives.flatten(0, 1).T], dim=1) * scale  # (N, N + N H)
    forward = info_nce(scores, torch.cat([same, wrong], dim=1))
    return (forward + info_nce(y @ x.T * scale, same.T)).mean() / 2


def grounded(anchors: Tensor, positives: Tensor, negatives: Tensor, exists: Tensor, scale: float) -> Tensor:
    """Unit vectors (N, E), (N, E), (N, H, E), (N, H) bool -> scalar, a mean over pairs that have a negative.

    >>> x = torch.eye(2)
    >>> grounded(x, x, x.flip(0).unsqueeze(1), torch.ones(2, 1).bool(), 1.0)
    tensor(0.3133)
    """
    scores = torch.cat([(anchors * positives).sum(-1, keepdim=True), torch.einsum("ne,nhe->nh", anchors, negatives)], 1)
    first = torch.ones_like(exists[:, :1])
    losses = -log_shares(scores * scale, torch.cat([first, exists], dim=1))[:, 0]  # (N,), 0 where nothing is compared
    return losses.sum() / exists.any(1).sum().clamp_min(1)
