"""What Prometheus is told, and the log of each request: names, units, and where the values come from.

server/metrics.yaml registers the same metrics with TorchServe, which makes a sample of each line of log that it gets.
Its own histograms end at 10 s, and a model that streams its weights from disk may take longer for one token; they also
want a line for each. So a histogram goes there as the counters that Prometheus has it as, in buckets of ours, and only
what has grown since the last report.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

from handler.engine import Engine
from handler.engine.stats import BOUNDS, Histogram
from handler.loading import LoadedModel
from handler.protocols.open_request import OpenRequest

logger = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's status for a client that hung up before it had its answer


@dataclass(frozen=True)
class Metric:
    """One name. labels: those besides the model's name."""

    name: str
    type: Literal["counter", "gauge"]
    unit: str
    labels: tuple[str, ...] = ()


HISTOGRAMS = ("llm_queue_seconds", "llm_time_to_first_token_seconds", "llm_time_between_tokens_seconds")
METRICS = {
    metric.name: metric
    for metric in [
        Metric("llm_requests_total", "counter", "requests", ("protocol", "status")),
        Metric("llm_prompt_tokens_total", "counter", "tokens"),
        Metric("llm_generated_tokens_total", "counter", "tokens"),
        Metric("llm_reused_prompt_tokens_total", "counter", "tokens"),
        Metric("llm_draft_tokens_total", "counter", "tokens"),
        Metric("llm_accepted_draft_tokens_total", "counter", "tokens"),
        *(Metric(f"{name}_bucket", "counter", "observations", ("le",)) for name in HISTOGRAMS),
        *(Metric(f"{name}_sum", "counter", "seconds") for name in HISTOGRAMS),
        *(Metric(f"{name}_count", "counter", "observations") for name in HISTOGRAMS),
        Metric("llm_forward_seconds_total", "counter", "seconds"),
        Metric("llm_streamed_bytes_total", "counter", "bytes"),
        Metric("llm_stream_wait_seconds_total", "counter", "seconds"),
        Metric("llm_running_sequences", "gauge", "sequences"),
        Metric("llm_waiting_sequences", "gauge", "sequences"),
        Metric("llm_kv_cache_used_tokens", "gauge", "tokens"),
        Metric("llm_kv_cache_free_tokens", "gauge", "tokens"),
        Metric("llm_load_seconds", "gauge", "seconds"),
        Metric("llm_weights_bytes", "gauge", "bytes", ("tier",)),
        Metric("llm_memory_used_bytes", "gauge", "bytes", ("tier",)),
    ]
}

# (name of the metric, the values of its labels, its value). A counter's value is its total.
Sample = tuple[str, tuple[str, ...], float]


class Metrics:
    """Reads the values of all metrics, and hands on those that have changed.

    load_seconds: how long the model took to load.
    emit: gets a metric, the values of its labels, and a gauge's value or what a counter has grown by.
    """

    def __init__(
        self,
        engine: Engine,
        loaded: LoadedModel,
        load_seconds: float,
        emit: Callable[[Metric, tuple[str, ...], float], None],
    ):
        self._engine, self._loaded, self._load_seconds, self._emit = engine, loaded, load_seconds, emit
        self._requests: dict[tuple[str, str], int] = {}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}
        self._process = psutil.Process()

    def finished(self, request_id: str, request: OpenRequest, status: int) -> None:
        """Count a request that has ended, and log it: whose and how long, but no word of it."""
        key = request.protocol, str(status)
        self._requests[key] = self._requests.get(key, 0) + 1
        logger.info(json.dumps(record(request_id, request, status)))

    def report(self) -> None:
        """Emit what has changed; everything the first time. In a thread of its own while the engine steps: all that it
        reads are numbers, and a total that it reads a moment too early is right the next time."""
        for name, labels, value in self._samples():
            metric, told = METRICS[name], self._told.get((name, labels))
            if value != told:
                self._emit(metric, labels, value - (told or 0) if metric.type == "counter" else value)
                self._told[name, labels] = value

    def report_forever(self, seconds: float) -> None:
        """Report again and again, so often."""
        while True:
            time.sleep(seconds)
            try:
                self.report()
            except Exception:
                logger.exception("the metrics could not be reported")

    def _samples(self) -> Iterator[Sample]:
        engine, stats = self._engine, self._engine.stats
        for labels, count in self._requests.copy().items():
            yield "llm_requests_total", labels, count
        yield "llm_prompt_tokens_total", (), stats.prompt_tokens
        yield "llm_generated_tokens_total", (), stats.generated_tokens
        yield "llm_reused_prompt_tokens_total", (), engine.num_reused_tokens
        yield "llm_draft_tokens_total", (), engine.speculator.num_drafted
        yield "llm_accepted_draft_tokens_total", (), engine.speculator.num_accepted
        histograms = (stats.queue, stats.first_token, stats.between_tokens)
        for name, histogram in zip(HISTOGRAMS, histograms, strict=True):
            yield from _of_histogram(name, histogram)
        yield "llm_forward_seconds_total", (), engine.forward_seconds
        streamed = self._loaded.streamed
        yield "llm_streamed_bytes_total", (), streamed.reader.bytes_read if streamed else 0
        yield "llm_stream_wait_seconds_total", (), streamed.wait_seconds if streamed else 0
        yield "llm_running_sequences", (), engine.num_running
        yield "llm_waiting_sequences", (), engine.num_waiting
        yield "llm_kv_cache_used_tokens", (), engine.kv_tokens_used
        yield "llm_kv_cache_free_tokens", (), engine.kv_tokens_free
        yield "llm_load_seconds", (), self._load_seconds
        for tier, held in self._loaded.placement.tiers.items():
            yield "llm_weights_bytes", (tier,), held.bytes
        yield "llm_memory_used_bytes", ("cpu",), self._process.memory_info().rss
        for index in range(torch.cuda.device_count()):
            yield "llm_memory_used_bytes", (f"gpu {index}",), torch.cuda.memory_reserved(index)


def _of_histogram(name: str, histogram: Histogram) -> Iterator[Sample]:
    """As Prometheus has it: each bucket counts what is in those before it too."""
    totals = list(itertools.accumulate(histogram.counts))
    for bound, total in zip((*BOUNDS, math.inf), totals, strict=True):
        yield f"{name}_bucket", ("+Inf" if bound == math.inf else f"{bound:g}",), total
    yield f"{name}_sum", (), histogram.sum
    yield f"{name}_count", (), totals[-1]


def record(request_id: str, request: OpenRequest, status: int) -> dict[str, Any]:
    """A finished request in the log. Seconds are from its arrival in the worker; null for what it did not come to."""
    jobs = request.jobs

    def seconds(times: list[float | None]) -> float | None:
        return min((round(at - request.received_at, 4) for at in times if at is not None), default=None)

    return {
        "event": "request",
        "id": request_id,
        "protocol": request.protocol,
        "status": status,
        "prompt_tokens": sum(len(job.prompt_ids) for job in jobs),
        "generated_tokens": sum(len(sequence.token_ids) for job in jobs for sequence in job.sequences),
        "queued_seconds": seconds([job.started_at for job in jobs]),
        "first_token_seconds": seconds([job.first_token_at for job in jobs]),
        "total_seconds": seconds([time.monotonic()]),
    }
