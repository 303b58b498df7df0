"""How often each source is drawn.

Sizes of sources differ by orders of magnitude. In proportion to size (alpha 1) the largest source is nearly all of the
training, in equal shares (alpha 0) the smallest is repeated until it is memorised; size**0.5 lies between them. Rules:

- temperature: shares of batches follow rows**alpha;
- proportional: each source as often as it fills batches (CoDiEmb, arXiv 2508.11442, training code);
- round_robin: equal shares, one after the other.

Replay (rehearsal, arXiv 1811.11682): where training goes on with new data, a source of an earlier stage states the
share of batches that it is to have, and the rule divides the rest among the new ones. An epoch is then as long as the
new sources need to be seen as often as without replay: their batches divided by their share.
"""

from collections.abc import Sequence
from typing import Literal

from mmembed.errors import ConfigError

MixingRule = Literal["temperature", "proportional", "round_robin"]


def shares(
    rule: MixingRule,
    sizes: Sequence[int | None],
    batch_rows: Sequence[int],
    explicit: Sequence[float | None],
    alpha: float = 0.5,
    replay: Sequence[float | None] | None = None,
) -> list[float]:
    """The share of batches of each source by a rule; the shares add up to 1.

    Args:
        sizes, explicit, alpha: as of `mixing_weights`; round_robin has no use for them, proportional none for alpha.
        batch_rows: rows of a batch of each source, of all processes.
        replay: the share of an earlier stage's source; the rule is for the others, those of None.

    Raises:
        ConfigError: as `mixing_weights`.
    """
    if replay is not None:
        new = [place for place, share in enumerate(replay) if share is None]
        of_new = shares(
            rule, [sizes[at] for at in new], [batch_rows[at] for at in new], [explicit[at] for at in new], alpha
        )
        found = dict(zip(new, of_new, strict=True))
        left = new_share(replay)
        return [left * found[place] if share is None else share for place, share in enumerate(replay)]
    if rule == "round_robin":
        return [1 / len(sizes)] * len(sizes)
    if rule == "proportional":
        batches = [None if size is None else max(1, size // rows) for size, rows in zip(sizes, batch_rows, strict=True)]
        return mixing_weights(batches, explicit, 1.0)
    return mixing_weights(sizes, explicit, alpha)


def new_share(replay: Sequence[float | None]) -> float:
    """The share of batches that sources of earlier stages leave to new ones."""
    return 1.0 - sum(share for share in replay if share is not None)


def mixing_weights(sizes: Sequence[int | None], explicit: Sequence[float | None], alpha: float = 0.5) -> list[float]:
    """The share of batches of each source; the shares add up to 1.

    Args:
        sizes: rows of each source; None of a stream.
        explicit: a source's own weight, in the unit of size**alpha weights relative to their mean (1.0 is an average
            source); None: size**alpha.
        alpha: 1 samples in proportion to size, 0 equally.

    Raises:
        ConfigError: no source, an empty source, a weight that is not above 0, a stream without one beside others.
    """
    known = [size for size in sizes if size is not None]
    if not sizes or min(known, default=1) <= 0:
        raise ConfigError(f"data.train: cannot mix sources of {list(sizes)} rows; remove the empty ones")
    if any(weight is not None and weight <= 0 for weight in explicit):
        raise ConfigError(f"data.train: weights {list(explicit)}; a weight is above 0, remove the source instead")
    if len(sizes) == 1:
        return [1.0]
    mean = sum(float(size) ** alpha for size in known) / max(1, len(known))
    weights = []
    for size, weight in zip(sizes, explicit, strict=True):
        if weight is None and size is None:
            raise ConfigError("data.train: nobody knows the length of a stream; give it a weight beside other sources")
        weights.append(weight if weight is not None else float(size or 0) ** alpha / mean)
    return [weight / sum(weights) for weight in weights]
