"""What a server counts, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (64, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


class Metrics:
    """The counters of one server; each has a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "mmembed_requests", "Requests by their answer", ("endpoint", "status"), registry=registry
        )
        self._seconds = Histogram(
            "mmembed_request_seconds", "From head to answer", ("endpoint",), buckets=SECONDS, registry=registry
        )
        self._open = Gauge("mmembed_open_requests", "Requests without their answer", registry=registry)
        self._waiting = Gauge("mmembed_waiting_inputs", "Inputs that wait for the model", registry=registry)
        self._waiting_tokens = Gauge("mmembed_waiting_tokens", "Tokens of those", registry=registry)
        of_a_batch = ("model",)
        self._batch_requests = Histogram(
            "mmembed_batch_requests", "Requests in a batch", of_a_batch, buckets=SIZES, registry=registry
        )
        self._batch_inputs = Histogram(
            "mmembed_batch_inputs", "Inputs in a batch", of_a_batch, buckets=SIZES, registry=registry
        )
        self._batch_tokens = Histogram(
            "mmembed_batch_tokens", "Tokens in a batch", of_a_batch, buckets=TOKENS, registry=registry
        )
        self._batch_seconds = Histogram(
            "mmembed_batch_seconds", "The model's time for a batch", of_a_batch, buckets=SECONDS, registry=registry
        )

    def opened(self) -> None:
        self._open.inc()

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        self._open.dec()
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def waiting(self, inputs: int, tokens: int) -> None:
        self._waiting.set(inputs)
        self._waiting_tokens.set(tokens)

    def batch(self, model: str, requests: int, inputs: int, tokens: int, seconds: float) -> None:
        """A batch that the model computed."""
        for histogram, value in (
            (self._batch_requests, requests),
            (self._batch_inputs, inputs),
            (self._batch_tokens, tokens),
            (self._batch_seconds, seconds),
        ):
            histogram.labels(model).observe(value)

    def text(self) -> bytes:
        return generate_latest(self._registry)
