"""sentence-transformers on a backbone's own folder, as the benchmarks compare with it: stock modules, mean pooling.

Not a folder of `mmembed export`: that one writes every input through a chat template, which would slow the peer down
where texts go to it bare. Pictures need the backbone's template.
"""

from __future__ import annotations

from typing import Any

OF_TEXT = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}


def mean_embedder(folder: str, *, pictures: bool, length: int, dtype: Any = None, device: str = "cpu") -> Any:
    """A SentenceTransformer.

    Args:
        pictures: inputs go through the chat template.
        dtype: of torch; None: sentence-transformers' own default.
    """
    import mmembed.backbones  # noqa: F401  # isort: skip - makes torchvision importable on a CPU machine

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    options: dict[str, Any] = {} if dtype is None else {"model_kwargs": {"dtype": dtype}}
    transformer = Transformer(folder, max_seq_length=length, **options, **({} if pictures else OF_TEXT))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=device)
