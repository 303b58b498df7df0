"""Importing this first lets torchvision load beside a CPU-only torch (the wheel misses two operator schemas there)."""

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
if not torch.cuda.is_available():
    for _name in ("nms", "qnms"):
        _LIBRARY.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
