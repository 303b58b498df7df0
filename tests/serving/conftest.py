import pytest
from families import build, picture

from mmembed import Embedder, Reranker
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.serving.models import ServedEmbedder, ServedReranker
from tests.serving.running import running


@pytest.fixture(scope="package")
def embedder():
    """The nano, with a prompt that tells queries from documents."""
    settings = EmbedderSettings("mmembed-nano", pooling="mean", prompt={"type": "instruct"}, dtype="float32")
    return Embedder(*build_from_settings(settings))


@pytest.fixture(scope="package")
def reranker(family_folder):
    """An untrained judge of pairs that sees pictures."""
    words = ["a", "b"]
    head, prompt = {"type": "yes_no", "words": words}, {"type": "judge", "words": words}
    return Reranker(*build(family_folder("qwen3_vl"), head=head, prompt=prompt))


@pytest.fixture(scope="package")
def served(embedder):
    return ServedEmbedder("nano", embedder)


@pytest.fixture(scope="module")
def client(served, reranker):
    """A server with both, with usual limits."""
    with running(served, ServedReranker("judge", reranker)) as client:
        yield client


@pytest.fixture(scope="session")
def photo():
    return picture(3, 96, 64)
