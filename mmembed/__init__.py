"""mmembed turns a decoder LLM or multimodal LLM into an embedder or a reranker.

    from mmembed import Embedder
    embedder = Embedder.from_pretrained("mmembed-nano")
    vectors = embedder.encode(["a red bus", {"image": "bus.jpg"}])

Names are imported when they are first used: `import mmembed` loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mmembed.version import __version__

if TYPE_CHECKING:
    from mmembed.config import load_config as load_config
    from mmembed.config.blocks import EmbedderConfig as EmbedderConfig
    from mmembed.config.blocks import RerankerConfig as RerankerConfig
    from mmembed.content import Audio as Audio
    from mmembed.content import Content as Content
    from mmembed.content import Document as Document
    from mmembed.content import Example as Example
    from mmembed.content import Image as Image
    from mmembed.content import Text as Text
    from mmembed.content import Video as Video
    from mmembed.errors import MmembedError as MmembedError
    from mmembed.inference.embedder import Embedder as Embedder
    from mmembed.inference.generative import ListwiseReranker as ListwiseReranker
    from mmembed.inference.generative import RationaleReranker as RationaleReranker
    from mmembed.inference.reranker import Reranker as Reranker
    from mmembed.media import MediaLimits as MediaLimits
    from mmembed.media import MediaStore as MediaStore
    from mmembed.search import top_k as top_k

_HOMES = {
    "Audio": "content",
    "Content": "content",
    "Document": "content",
    "Example": "content",
    "Image": "content",
    "Text": "content",
    "Video": "content",
    "Embedder": "inference.embedder",
    "Reranker": "inference.reranker",
    "ListwiseReranker": "inference.generative",
    "RationaleReranker": "inference.generative",
    "top_k": "search",
    "EmbedderConfig": "config.blocks",
    "RerankerConfig": "config.blocks",
    "load_config": "config",
    "MediaLimits": "media",
    "MediaStore": "media",
    "MmembedError": "errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmembed' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"mmembed.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
