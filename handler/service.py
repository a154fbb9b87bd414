"""What TorchServe calls: its requests in, its answers out, in either of its batching modes.

Continuous mode calls `handle()` again and again with every request that is still open; one that is left out of the
reply stays open. Plain mode wants a whole batch answered before it hands over the next one.
"""

import gc
import threading
import time
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ts.context import Context
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.metrics.caching_metric import CachingMetric
from ts.metrics.metric_type_enum import MetricTypes
from ts.protocol import otf_message_handler
from ts.torch_handler.base_handler import BaseHandler

import handler.libraries  # noqa: F401  (before all that imports transformers)
from handler.checkpoint import open_checkpoint, open_draft, work_folder
from handler.engine import Engine
from handler.engine.draft_model import DraftModel
from handler.field_reader import FieldReader
from handler.loading import load_model
from handler.memory import page_cache_room, with_kv_cache_limit
from handler.metrics import CLIENT_GONE, Metric, Metrics
from handler.protocols.base import ModelInfo
from handler.protocols.open_request import OpenRequest, Reply
from handler.protocols.router import OPERATOR
from handler.settings import read_settings
from handler.weights.threads import FreeCores

gc.freeze()  # what was imported: collections while a model is loaded need not look through it
METRICS_PERIOD = 1.0  # seconds between two reports of what has changed
PACKAGES = ("torchserve", "torch", "transformers", "accelerate")


class LargeModelHandler(BaseHandler):
    """Serves a causal language model across GPUs, CPU and disk, many requests at once."""

    def initialize(self, context: Context) -> None:
        """Load the checkpoint in TorchServe's model folder as its setup_config.json says.

        Raises SettingsError, CheckpointError or LoadError; TorchServe then tries again, and logs each try.
        """
        began = time.monotonic()
        model_dir = Path(context.system_properties["model_dir"])
        self.settings = read_settings(model_dir / "setup_config.json")
        checkpoint, draft = open_checkpoint(model_dir), open_draft(model_dir)
        self.loaded = load_model(checkpoint, self.settings, work_folder(model_dir), draft)
        self.model, placement = self.loaded.model, self.loaded.placement
        config = with_kv_cache_limit(self.settings, self.model, placement)
        self.engine = Engine(self.loaded.model, self.loaded.tokenizer, config)
        if self.loaded.streamed:
            self.loaded.streamed.page_cache_room = partial(page_cache_room, self.engine)
            self.loaded.streamed.wait_seconds = 0.0  # the engine's self-check counts as no forward
        if self.loaded.draft:
            vocab_size = self.model.config.get_text_config().vocab_size
            self.engine.speculator.draft_model = DraftModel(self.loaded.draft, vocab_size)
        self.model_info = ModelInfo(
            name=context.model_name,
            version=context.manifest["model"]["modelVersion"],
            tokenizer=self.loaded.tokenizer,
            max_sequence_length=self.engine.capacity.max_sequence_length,
            return_full_text=self.settings.return_full_text,
            created=int(time.time()),
            describe=self.describe_handle,
        )
        self.continuous = bool((context.model_yaml_config or {}).get("continuousBatching"))
        self.open_requests: dict[str, OpenRequest] = {}  # by TorchServe's request id
        self.metrics = Metrics(self.engine, self.loaded, time.monotonic() - began, self._emit)
        self.metrics.report()
        threading.Thread(target=self.metrics.report_forever, args=[METRICS_PERIOD], daemon=True).start()
        self.free_cores = FreeCores()
        otf_message_handler._retrieve_buffer = FieldReader()
        # What is loaded stays: without this the collector walks over all of it now and then, for 150 ms.
        gc.collect()
        gc.freeze()
        self.initialized = True

    def handle(self, data: list[dict], context: Context) -> list[Any]:
        """Carry every request of the batch on and reply to those that have something to say."""
        self.context = context
        requests = self.preprocess(data)
        self.inference(requests)
        return self.postprocess(requests)

    def preprocess(self, data: list[dict]) -> list[OpenRequest]:
        """The batch's requests, in order: known ones go on, new ones begin, missing ones are cancelled."""
        ids = [self.context.get_request_id(index) for index in range(len(data))]
        for gone in self.open_requests.keys() - set(ids):
            request = self.open_requests.pop(gone)
            request.cancel()
            self.metrics.finished(gone, request, CLIENT_GONE)
        for index, (request_id, entry) in enumerate(zip(ids, data, strict=True)):
            if request_id not in self.open_requests:
                path = self._path(index)
                self.open_requests[request_id] = OpenRequest(entry, path, self.model_info, self.engine)
        return [self.open_requests[request_id] for request_id in ids]

    def _path(self, index: int) -> Any:
        """What a request asks for, as a path below the model's version. The management API asks for a description
        with a header, which any client can send too; but the inference API marks its requests with another one."""
        header = self.context.get_request_header
        if header(index, "describe") == "True" and header(index, "explain") is None:
            return OPERATOR
        return header(index, "url_path") or ""

    def inference(self, requests: list[OpenRequest]) -> None:
        """Run the engine: in continuous mode for a time slice, or until a request is done and its client can have
        its answer; in plain mode until all are done, sending parts of streams on the way."""
        if not self.continuous:
            while not all(request.finished for request in requests):
                self._run(requests)
                self._send_parts(requests)
        elif not any(request.finished for request in requests):
            self._run(requests)

    def postprocess(self, requests: list[OpenRequest]) -> list[Any]:
        """TorchServe's list of bodies, with status and headers in the context."""
        replies = {index: request.reply(watch=self.continuous) for index, request in enumerate(requests)}
        for request_id, request in zip(list(self.context.request_ids.values()), requests, strict=True):
            if request.finished:
                del self.open_requests[request_id]
                self.metrics.finished(request_id, request, request.status)
        return self._write(replies, len(requests))

    def describe_handle(self) -> dict[str, Any]:
        """The model as it is loaded: where its layers are, its dtype, its size in bytes, and the versions."""
        return {
            "model_type": self.model.config.model_type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "products": self.loaded.products,
            "memory_footprint": self.model.get_memory_footprint(),
            "max_sequence_length": self.engine.capacity.max_sequence_length,
            "engine": {"running": self.engine.num_running, "waiting": self.engine.num_waiting},
            "device_map": self.loaded.device_map,
            "tiers": {device: vars(tier) for device, tier in self.loaded.placement.tiers.items()},
            "streaming": self._streaming(),
            "draft_model": self._draft_model(),
            "versions": {package: version(package) for package in PACKAGES},
        }

    def _streaming(self) -> dict[str, Any] | None:
        """How weights come from disk: how they are read, how fast that was when it was measured, what was read so far,
        how much of it is left to the page cache now, for what share of the model's time it has waited for them, and
        what speculation has come to. None when nothing is on disk."""
        if not (streamed := self.loaded.streamed):
            return None
        return {
            "method": str(streamed.reader.method),
            "measured_bytes_per_second": int(streamed.rate),
            "bytes_read": streamed.reader.bytes_read,
            "page_cache_bytes": streamed.page_cache_bytes,
            "share_waited": round(streamed.wait_seconds / max(self.engine.forward_seconds, 1e-9), 3),
            "draft_tokens": self.engine.speculator.num_drafted,
            "accepted_draft_tokens": self.engine.speculator.num_accepted,
        }

    def _draft_model(self) -> dict[str, Any] | None:
        """The model that guesses tokens, where there is one. in_use: not any more after an error."""
        if not (draft := self.loaded.draft):
            return None
        return {
            "model_type": draft.config.model_type,
            "dtype": str(draft.dtype).removeprefix("torch."),
            "memory_footprint": draft.get_memory_footprint(),
            "in_use": self.engine.speculator.draft_model is not None,
        }

    def _emit(self, metric: Metric, labels: tuple[str, ...], value: float) -> None:
        """Write the line of log that TorchServe makes a sample for Prometheus of."""
        caching = CachingMetric(metric.name, metric.unit, ["model_name", *metric.labels], MetricTypes(metric.type))
        caching.add_or_update(value, [self.model_info.name, *labels])

    def _run(self, requests: list[OpenRequest]) -> None:
        """Step until the time slice is over, or somebody has a first token or a whole answer to be sent."""
        seconds = self.settings.time_slice_ms / 1000
        deadline = time.monotonic() + seconds
        for request in requests:
            request.poll(0 if self.engine.has_work else seconds)
        self.free_cores.match()
        try:
            while self.engine.has_work and time.monotonic() < deadline:
                if any(job.finished or len(job.sequences[0].token_ids) == 1 for job in self.engine.step()):
                    return
        finally:
            self.free_cores.rest()

    def _send_parts(self, requests: list[OpenRequest]) -> None:
        """Plain mode: send what streams have to say in the middle of a batch, and nothing to the others."""
        replies = {index: request.reply(watch=False) for index, request in enumerate(requests) if not request.finished}
        # An error that ends a stream is left for the end of the batch.
        speaking = {index: reply for index, reply in replies.items() if reply and reply.more}
        if speaking:
            ids = {index: self.context.request_ids[index] for index in speaking}
            bodies = self._write(speaking, len(requests))
            send_intermediate_predict_response(bodies, ids, "Prediction success", 200, self.context)

    def _write(self, replies: Mapping[int, Reply | None], count: int) -> list[Any]:
        """Replies, by position in the batch -> the list that TorchServe wants, each in its place."""
        bodies: list[Any] = [""] * count
        criteria = {}
        for index, reply in replies.items():
            if reply is None:
                # TorchServe encodes the requests in this dictionary: one that is missing stays open, unanswered.
                del self.context.request_ids[index]
                continue
            bodies[index] = reply.body
            criteria[index] = lambda _, more=reply.more: None if more is None else not more
            self.context.set_response_status(reply.status, reply.phrase, index)
            self.context.set_response_content_type(index, reply.content_type)
            for name, value in reply.headers.items():
                self.context.set_response_header(index, name, value)
        self.context.stopping_criteria = criteria if self.continuous else None
        return bodies
