"""The first layer of a vision tower whose inputs are patches, one kernel wide: a product of matrices.

y = W x + b        W (out_channels, C * T * p * p), x a patch

transformers writes it as nn.Conv3d. cuDNN has no kernel for that shape in bfloat16: users measured 3.7 s a call on an
H100, where the product takes milliseconds (transformers pull request 45041, whose `fusion_config` renames the weights).
Here the module keeps its weights and their names, and on a CPU its arithmetic, which `mmembed.inference.cpu` replaces.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

DEVICES = frozenset({"cuda"})  # where the convolution is slow


class PatchConv3d(nn.Conv3d):
    """nn.Conv3d that multiplies matrices where an input is one patch of the kernel's size."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *kernel_size) -> (N, out_channels, 1, 1, 1); any other input as nn.Conv3d."""
        if input.device.type not in DEVICES or not self.takes_one_patch(input):
            return super().forward(input)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]

    def takes_one_patch(self, input: Tensor) -> bool:
        one = input.dim() == 5 and tuple(input.shape[2:]) == self.kernel_size
        return one and self.groups == 1 and set(self.padding) == {0}


def multiply_patches(model: nn.Module) -> None:
    """Makes every nn.Conv3d of the model a `PatchConv3d`, in place; its parameters stay the same objects."""
    for module in model.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = PatchConv3d
