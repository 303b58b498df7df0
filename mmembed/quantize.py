"""Smaller vectors: a Matryoshka prefix, float16, bfloat16, int8 or one bit a dimension.

Every row is converted on its own (no calibration set, no state), so a corpus can be converted batch by batch, today and
next year, and stay comparable. Bytes a dimension and what is lost, for a vector v of E dimensions:

    float32  4    nothing
    float16  2    about 3 decimal digits are kept
    bfloat16 2    about 2 decimal digits are kept, of any size; numpy has no such dtype, the array is its bits in uint16
    int8     1    round(127 v / max|v|): the direction is kept to about 1 %, the length is not: compare by cosine
    binary   1/8  the sign of each dimension, 8 to a byte, first dimension in the highest bit (numpy.packbits)

`decode` is the inverse that search uses: int8 rows come back with unit length, binary rows as -1 / +1 divided by
sqrt(E), so that a dot product of decoded rows is their cosine. Cost: one pass over the rows.
"""

from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmembed.errors import MmembedError, nearest

Precision = Literal["float32", "float16", "bfloat16", "int8", "binary"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
STORED_DTYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "binary": np.uint8,
}


def check_precision(precision: str) -> Precision:
    """The name itself; raises MmembedError naming the nearest known one."""
    if precision not in PRECISIONS:
        raise MmembedError(f"precision: there is no '{precision}'; {nearest(precision, PRECISIONS)}")
    return cast(Precision, precision)


def stored_width(dim: int, precision: Precision) -> int:
    """How many columns a vector of `dim` dimensions takes in an array of this precision."""
    return -(-dim // 8) if precision == "binary" else dim


def truncate(vectors: NDArray[np.float32], dim: int, normalize: bool = True) -> NDArray[np.float32]:
    """The first `dim` dimensions, of unit length again.

    Truncating after normalising leaves vectors of different lengths, hence wrong cosines (Matryoshka representation
    learning, arXiv 2205.13147, compares re-normalised prefixes).

    Args:
        vectors: (..., E) float32.
        dim: 1 <= dim <= E.
        normalize: False keeps the prefix as it is, for models that do not normalise.

    Returns:
        (..., dim) float32. Raises MmembedError when `dim` is out of range.
    """
    size = vectors.shape[-1]
    if not 1 <= dim <= size:
        raise MmembedError(f"truncate_dim: {dim} dimensions of vectors that have {size}; give 1 to {size}")
    prefix = vectors[..., :dim]
    return unit_rows(prefix) if normalize and dim < size else prefix


def quantize(vectors: NDArray[np.float32], precision: Precision) -> NDArray[np.generic]:
    """(..., E) float32 -> (..., stored_width(E)) in the dtype of `precision`; see the module's table."""
    if precision == "float32":
        return vectors
    if precision == "float16":
        return vectors.astype(np.float16)
    if precision == "bfloat16":
        bits: NDArray[np.uint16] = torch.tensor(vectors).bfloat16().view(torch.uint16).numpy()
        return bits
    if precision == "int8":
        peak = np.abs(vectors).max(axis=-1, keepdims=True, initial=0.0)
        return np.rint(vectors * (127.0 / np.maximum(peak, np.finfo(np.float32).tiny))).astype(np.int8)
    return np.packbits(vectors > 0, axis=-1)


def decode(stored: NDArray[np.generic], dim: int | None = None) -> NDArray[np.float32]:
    """Stored rows back to float32, the dtype telling the precision (uint8 is binary).

    Args:
        stored: (..., W) float32, float16, int8, uint16 of bfloat16's bits, or uint8 of packed signs.
        dim: of binary rows, the dimensions before packing; W * 8 when not given.

    Returns:
        (..., E) float32: int8 and binary rows of unit length, floats as they are. Raises MmembedError on another dtype.
    """
    if stored.dtype == np.int8:
        return unit_rows(stored.astype(np.float32))
    if stored.dtype == np.uint8:
        signs = np.unpackbits(stored.view(np.uint8), axis=-1, count=dim).astype(np.float32)
        return (2.0 * signs - 1.0) / np.float32(np.sqrt(max(1, signs.shape[-1])))
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if stored.dtype.kind == "f":
        return np.asarray(stored, dtype=np.float32)
    raise MmembedError(
        f"vectors: dtype {stored.dtype} is none of float32, float16, uint16 (bfloat16), int8 and uint8 (binary)"
    )


def to_tensor(stored: NDArray[Any]) -> Tensor:
    """The array as a tensor on the same memory; bits of bfloat16 become bfloat16."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def to_array(vectors: NDArray[Any] | Tensor) -> NDArray[Any]:
    """`to_tensor` backwards; an array as it is."""
    if not isinstance(vectors, Tensor):
        return np.asarray(vectors)
    vectors = vectors.detach().cpu()
    array: NDArray[Any] = (vectors.view(torch.uint16) if vectors.dtype == torch.bfloat16 else vectors).numpy()
    return array


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows divided by their length; a row of zeros stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, np.finfo(np.float32).tiny), dtype=np.float32)
