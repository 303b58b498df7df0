"""Backbones: any decoder LLM or vision-language model of transformers, behind one small contract (`Family`).

`Family` in `family.py` holds what is the same everywhere; a family that deviates is one file here. `load_backbone`
loads model, processor and family together. The torchvision shim acts before anything of transformers is imported, and
so does what keeps its optional libraries from talking about parts that are not used.
"""

from mmembed.backbones.quiet_imports import silence_unused_parts
from mmembed.backbones.torchvision_shim import declare_missing_operators

declare_missing_operators()
silence_unused_parts()

from mmembed.backbones.family import FAMILIES, Family, Layout, Medium  # noqa: E402
from mmembed.backbones.loading import Backbone, load_backbone, resolve_backbone, set_attention  # noqa: E402

__all__ = ["FAMILIES", "Backbone", "Family", "Layout", "Medium", "load_backbone", "resolve_backbone", "set_attention"]
