"""Lets torchvision import beside a CPU build of torch.

torchvision's wheel registers the fake kernels of two C++ operators at import; with a CPU-only torch they do not
exist and the import fails ("operator torchvision::nms does not exist"), which breaks every image processor of
transformers. Declaring the two schemas first is enough: transforms, image and video processors need neither operator.
Costs one library handle; does nothing where torch has CUDA or torchvision was imported already.
"""

import importlib.util
import sys

import torch

_SCHEMAS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # the registration lives as long as this reference


def declare_missing_operators() -> None:
    """Declares `torchvision::nms` and `torchvision::qnms` once, where they are missing."""
    global _library
    if _library is not None or "torchvision" in sys.modules or torch.version.cuda is not None:
        return
    if importlib.util.find_spec("torchvision") is None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _library.define(operator + _SCHEMAS)
