"""What a server counts, for Prometheus and for its own page."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_RECENT = 20

Readings = Mapping[str, tuple[str, Callable[[], float]]]  # name -> what it is, and what reads it


class Metrics:
    """Counts of one server.

    Attributes:
      first_token_seconds, between_tokens_seconds, request_seconds: histograms of latencies, of requests that predict.
      prompt_tokens, generated_tokens: how many went in and came out.
      recent_errors: what was refused or failed of late: time, endpoint, status, code. No words of any request.
    """

    def __init__(self, gauges: Readings, counters: Readings) -> None:
        """Prepares; `gauges` may fall, `counters` only rise."""
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter(
            "meshway_requests",
            "Requests by endpoint and status",
            ["endpoint", "status"],
            registry=registry,
        )
        self._rejected = Counter("meshway_rejected", "Requests refused, by reason", ["reason"], registry=registry)
        self.prompt_tokens = Counter("meshway_prompt_tokens", "Tokens of prompts that were read", registry=registry)
        self.generated_tokens = Counter("meshway_generated_tokens", "Tokens that were made", registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"meshway_{name}", text, registry=registry, buckets=buckets)

        self.first_token_seconds = histogram("first_token_seconds", "From request to first token", _SECONDS)
        self.between_tokens_seconds = histogram(
            "between_tokens_seconds", "Between tokens of a prediction, after the first", _BETWEEN_SECONDS
        )
        self.request_seconds = histogram("request_seconds", "From request to last token", _SECONDS)
        for name, (text, read) in {**gauges, **counters}.items():
            Gauge(f"meshway_{name}", text, registry=registry).set_function(read)
        self.recent_errors: deque[dict[str, Any]] = deque(maxlen=_RECENT)

    def answered(self, endpoint: str, status: int, code: str | None = None) -> None:
        """Counts an answer; `code` is that of its error."""
        self._requests.labels(endpoint, str(status)).inc()
        if status >= 400:
            self.recent_errors.append({"time": time.time(), "endpoint": endpoint, "status": status, "code": code})
            self._rejected.labels(code or str(status)).inc()

    @property
    def total_generated(self) -> int:
        """How many tokens were made so far."""
        return int(self._registry.get_sample_value("meshway_generated_tokens_total") or 0)

    def text(self) -> bytes:
        """Returns all of it as Prometheus reads it."""
        return generate_latest(self._registry)
