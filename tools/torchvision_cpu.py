"""Lets torchvision import beside a CPU build of torch, in every process of an environment: make_vllm_env.sh puts it
into site-packages, with a .pth file that imports it.

torchvision's wheel registers fake kernels of two C++ operators that a CPU build lacks, so its import fails, and with it
the image processors of transformers. Here their schemas are declared when somebody asks for torchvision, by an importer
that finds nothing: a process that does not ask pays 0.1 ms, not torch's two seconds.
"""

import sys

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Declares:
    kept = None  # the declarations live as long as this reference

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.kept is None:
            import torch

            if torch.version.cuda is None:
                self.kept = torch.library.Library("torchvision", "FRAGMENT")
                for operator in OPERATORS:
                    self.kept.define(operator + SCHEMA)
        return


sys.meta_path.insert(0, Declares())
