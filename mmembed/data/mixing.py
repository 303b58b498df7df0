"""How often each source is drawn.

Sizes of sources differ by orders of magnitude. In proportion to size (alpha 1) the largest source is nearly all of the
training, in equal shares (alpha 0) the smallest is repeated until it is memorised; size**0.5 lies between them.
"""

from collections.abc import Sequence

from mmembed.errors import ConfigError


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
