"""The guide of a contrast: a second judge, by whose scores negatives that it likes too well do not count.

    dropped = { j : t_ij > t_i+ - m }              absolute
    dropped = { j : t_ij > t_i+ - m |t_i+| }       relative

t are the guide's similarities, t_i+ that of the query's lowest-scored positive, m the margin. A margin of 0 is GIST
(GISTEmbed, arXiv 2402.16829): what the guide rates above the positive is taken for a positive. Relative is
t_i+ (1 - m), as sentence-transformers has it, where t_i+ is above 0; below, that product would be above the positive.
The guide judges every cell that the contrast compares: in-batch negatives, mined ones, with `same_tower_negatives`
queries.

Its similarities are those of a teacher, which encodes each batch, or of another embedder, which encodes the data once
before the first step (`mmembed.training.guide_vectors`), or scores in the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from mmembed.errors import ConfigError
from mmembed.registry import check_options


class Guide:
    """What `guide` of an objective says.

    Args:
        momentum: the guide is a teacher (`mmembed.training.teacher`) that follows the model; 1, the default, is the
            model that training starts from. null: the data's `score` of a query's own documents.
        model: another embedder is the guide, a saved one or a backbone; it stands in the place of `momentum`.
        margin: above 0 drops more than what the guide rates above the positive, below 0 less.
        strategy: whether the margin is a difference (`absolute`) or a share of the positive's score (`relative`).
    """

    def __init__(
        self,
        momentum: Annotated[float, Field(gt=0, le=1)] | None = 1.0,
        model: str | None = None,
        margin: Annotated[float, Field(ge=-2, le=2)] = 0.0,
        strategy: Literal["absolute", "relative"] = "absolute",
    ) -> None:
        self.momentum = momentum if model is None else None
        self.model, self.margin, self.strategy = model, margin, strategy

    @classmethod
    def of(cls, block: Mapping[str, Any] | None) -> Guide | None:
        """Of a block; none of None. Raises ConfigError for an option or a value that it does not take."""
        if block is None:
            return None
        options = check_options(cls, block, "objective.guide")
        if options.get("model") is not None and "momentum" in options:
            raise ConfigError(
                f"objective.guide: model '{options['model']}' and a momentum are two guides; keep one of them"
            )
        return cls(**options)

    @property
    def by_score(self) -> bool:
        """Whether the data's `score` guides."""
        return self.momentum is None and self.model is None

    def false_negatives(self, judged: Tensor, relevance: Tensor, valid: Tensor) -> Tensor:
        """Which negatives do not count, (Q, C) bool.

        Args:
            judged: (Q, C), the guide's similarities; NaN where it has none: such cells count, and so do all of a row
                whose positives have none.
            relevance, valid: (Q, C), as `Scores` has them.
        """
        known = valid & ~judged.isnan()  # (Q, C)
        positive = relevance > 0
        least = judged.masked_fill(~(known & positive), float("inf")).amin(1, keepdim=True)  # (Q, 1)
        below = self.margin if self.strategy == "absolute" else self.margin * least.abs()
        return known & ~positive & (judged > least - below)
