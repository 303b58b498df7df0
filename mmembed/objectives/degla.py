"""Global and local alignment: compositional negatives without forgetting (DeGLA, arXiv 2504.16801).

L = L_global + w_i L_IGC + w_t L_TGC + w_d L_d

Over queries x, positives y and the H hard negatives n_ik of each pair:

- L_global: NegCLIP's, InfoNCE of x with all positives and negatives, and of y with all x, averaged;
- L_IGC (image-grounded): -log softmax of x_i.y_i among x_i.y_i and its own negatives x_i.n_ik;
- L_TGC (text-grounded): the same with y_i in the place of x_i, and the teacher's y_i as the positive;
- L_d: the squared distance to the teacher of all x, y and n, summed, so that it grows with the batch (256 pairs there).

The teacher is a running mean of the weights (`momentum`). The released TGC masks the wrong negatives (it tiles where
they are stored sample by sample); ours is the intended form. With `momentum: null` the positive's own vector without a
gradient is TGC's positive and L_d is 0: what protects from forgetting is missing. Cost: (N, N (1 + H)) floats, and the
teacher's (`mmembed.training.teacher`).

When: captions have hard negatives of word order or attributes, and what the model knew must stay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mmembed.errors import ConfigError
from mmembed.objectives.aligned import Aligned, Momentum, Pairs, Taught
from mmembed.objectives.softmax import info_nce, log_shares
from mmembed.registry import Above0, Weight

DISTILLATION = 0.005
TEXT_TEMPERATURE = 0.1


class DeGLA(Aligned):
    """NegCLIP's contrast, each query and positive against its own hard negatives, and distance to a slow teacher.

    Args:
        temperature: 0.07, of the global and the image-grounded term.
        text_temperature: of the text-grounded term (default 0.1), where that has a weight.
        image_grounded, text_grounded: weights, 0.1 each in the paper.
        distillation: weight of the distance to the teacher, 0.005 in the paper; 0 where there is no teacher.
        momentum: of the teacher; 0.9996 in the paper. null: none.

    Raises:
        ConfigError: a weight of the distance to a teacher that is not there, a temperature of a term without weight.
    """

    name = "degla"
    least_pairs = 2
    contrasts = True
    takes_negatives = needs_negatives = True

    def __init__(
        self,
        temperature: Above0 = 0.07,
        text_temperature: Above0 | None = None,
        image_grounded: Weight = 0.1,
        text_grounded: Weight = 0.1,
        distillation: Weight | None = None,
        momentum: Momentum | None = 0.9996,
    ) -> None:
        super().__init__()
        if distillation and momentum is None:
            raise ConfigError(
                f"objectives.degla.distillation: {distillation:g} has no teacher with momentum: null; remove one"
            )
        if text_temperature is not None and text_grounded == 0:
            raise ConfigError(
                f"objectives.degla.text_temperature: {text_temperature:g} has no effect with text_grounded: 0; remove "
                "one"
            )
        self.momentum = momentum
        self.distillation = distillation if distillation is not None else 0.0 if momentum is None else DISTILLATION
        self.temperature = temperature
        self.text_temperature = TEXT_TEMPERATURE if text_temperature is None else text_temperature
        self.image_grounded, self.text_grounded = image_grounded, text_grounded

    @property
    def teacher_momentum(self) -> float | None:
        return self.momentum

    def term(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = pairs.unit
        negatives, exists = functional.normalize(pairs.negatives, dim=-1), pairs.has_negative
        wrong = ~exists.flatten() | pairs.knows(pairs.negative_keys.flatten(0, 1))  # (N, N H)
        whole = global_term(x, y, negatives, pairs.same, wrong, 1 / self.temperature)
        image = grounded(x, y, negatives, exists, 1 / self.temperature)
        positives = y.detach() if pairs.taught is None else pairs.taught.unit_views[1]
        text = grounded(y, positives, negatives, exists, 1 / self.text_temperature)
        loss = whole + self.image_grounded * image + self.text_grounded * text
        metrics = {"global": whole.detach(), "image_grounded": image.detach(), "text_grounded": text.detach()}
        if pairs.taught is not None:
            forgotten = distance(torch.stack([x, y]), negatives, exists, pairs.taught)
            loss, metrics["distillation"] = loss + self.distillation * forgotten, forgotten.detach()
        return loss, metrics


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
    first = exists.new_ones(len(exists), 1)
    losses = -log_shares(scores * scale, torch.cat([first, exists], dim=1))[:, 0]  # (N,), 0 where nothing is compared
    return losses.sum() / exists.any(1).sum().clamp_min(1)


def distance(views: Tensor, negatives: Tensor, exists: Tensor, taught: Taught) -> Tensor:
    """Unit vectors (2, N, E), (N, H, E), those that exist (N, H) bool -> scalar, a sum over all of them.

    >>> taught = Taught(torch.eye(2).flip(0).expand(2, -1, -1), torch.zeros(2, 0, 2))
    >>> distance(torch.eye(2).expand(2, -1, -1), torch.zeros(2, 0, 2), torch.zeros(2, 0).bool(), taught)
    tensor(8.)
    """
    of_negatives = (negatives - functional.normalize(taught.negatives, dim=-1)).square().sum(-1)  # (N, H)
    return (views - taught.unit_views).square().sum() + (of_negatives * exists).sum()
