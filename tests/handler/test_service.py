"""What TorchServe calls, with TorchServe's own context filled by hand, in both of its modes; no server."""

import gc
import itertools
import json
import logging
import re
import time

import pytest
from ts.context import Context, RequestProcessor
from ts.protocol import otf_message_handler

from handler import service
from handler.engine import speculation
from handler.field_reader import FieldReader
from handler.service import LargeModelHandler
from handler.settings import Settings
from handler.weights import streaming
from tests.protocols.corpus import OPENAPI

SETTINGS = {"max_new_tokens": 6, "max_batch_size": 4, "max_queue": 6}
PROMPT = "My dog is cute"
ids = itertools.count()


@pytest.fixture(scope="module")
def model_dir(bloom, tmp_path_factory):
    """As TorchServe sees a no-archive model."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "model").symlink_to(bloom)
    (folder / "setup_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture(params=[True, False], ids=["continuous", "plain"])
def continuous(request):
    return request.param


@pytest.fixture
def make_handler(model_dir, monkeypatch):
    monkeypatch.setattr(service, "METRICS_PERIOD", 10**6)  # reports come when a test asks for them
    monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", None)  # which a handler replaces

    def make_handler(continuous):
        manifest = {"model": {"modelVersion": "1.0"}}
        config = {"continuousBatching": continuous}
        context = Context("bloom", str(model_dir), manifest, 8, None, "0.12.0", model_yaml_config=config)
        handler = LargeModelHandler()
        handler.initialize(context)
        return Frontend(handler, context)

    return make_handler


class Frontend:
    """TorchServe's side: a batch of open requests that it hands over again and again.

    bodies, statuses: what each request has got so far. A request stays open while its stopping criterion says so, or
    while it is missing in the reply.
    """

    def __init__(self, handler, context):
        self.handler, self.context = handler, context
        self.entries, self.headers, self.bodies, self.statuses = {}, {}, {}, {}
        self.open = []

    def send(self, body, **headers):
        request_id = f"request-{next(ids)}"
        self.entries[request_id], self.headers[request_id] = {"body": body}, headers
        self.bodies[request_id] = []
        self.open.append(request_id)
        return request_id

    def hang_up(self, request_id):
        self.open.remove(request_id)

    def call(self):
        """One call of `handle()`."""
        batch, context = list(self.open), self.context
        context.request_ids = dict(enumerate(batch))
        context.request_processor = [RequestProcessor(dict(self.headers[one])) for one in batch]
        context.stopping_criteria = None
        replies = self.handler.handle([self.entries[one] for one in batch], context)
        assert len(replies) == len(batch)
        for index, request_id in enumerate(batch):
            if index not in context.request_ids:
                continue  # it stays open, unanswered
            self.bodies[request_id].append(replies[index])
            self.statuses.setdefault(request_id, context.get_response_status(index)[0])
            ends = context.stopping_criteria[index](None) if context.stopping_criteria else None
            if ends is not False:
                self.open.remove(request_id)

    def answer(self, request_id):
        """Call until it is answered: its status and its whole body."""
        while request_id in self.open:
            self.call()
        parts = self.bodies[request_id]
        return self.statuses[request_id], json.loads(parts[-1]) if parts[-1].startswith("{") else "".join(parts)


def instances(*prompts, **parameters):
    return {"instances": list(prompts), "parameters": parameters}


def test_torchserves_messages_come_out_of_a_buffer(make_handler):
    make_handler(True)
    assert isinstance(otf_message_handler._retrieve_buffer, FieldReader)


def test_answers_are_the_same_alone_and_together(make_handler, continuous):
    frontend = make_handler(continuous)
    prompts = [PROMPT, "東京", "a"]
    alone = [frontend.answer(frontend.send(instances(prompt)))[1]["predictions"][0] for prompt in prompts]
    together = [frontend.send(instances(prompt)) for prompt in prompts]
    assert [frontend.answer(one) for one in together] == [(200, {"predictions": [text]}) for text in alone]
    assert not frontend.open and not frontend.handler.open_requests


def test_each_request_has_its_own_status(make_handler, continuous):
    frontend = make_handler(continuous)
    sent = [frontend.send(instances(PROMPT)), frontend.send({"no": 1}), frontend.send({}, url_path="nowhere")]
    assert [frontend.answer(one)[0] for one in sent] == [200, 400, 404]
    assert "nowhere" in frontend.answer(sent[2])[1]["error"]["message"]


def test_requests_join_and_leave_between_two_calls(make_handler):
    frontend = make_handler(True)
    bodies = [instances(PROMPT, max_new_tokens=400), instances("a", max_new_tokens=1)]
    alone = [frontend.answer(frontend.send(body)) for body in bodies]
    long = frontend.send(bodies[0])
    frontend.call()
    short = frontend.send(bodies[1])
    assert frontend.answer(short) == alone[1]
    assert long in frontend.open
    assert frontend.answer(long) == alone[0]


def test_a_request_gets_no_reply_before_its_first_token_and_then_empty_parts(make_handler):
    """The first reply fixes the status; later ones let TorchServe notice a hang-up."""
    frontend = make_handler(True)
    waiting = [frontend.send(instances(PROMPT, max_new_tokens=500)) for _ in range(5)]  # one more than there are rows
    frontend.call()
    assert [frontend.bodies[one] for one in waiting] == [[""]] * 4 + [[]]


def test_a_client_that_hung_up_frees_its_row(make_handler):
    frontend = make_handler(True)
    gone = frontend.send(instances(PROMPT, max_new_tokens=500))
    frontend.call()
    assert frontend.handler.engine.num_running == 1
    frontend.hang_up(gone)
    frontend.answer(frontend.send({}, url_path="health"))
    assert frontend.handler.engine.num_running == 0 and not frontend.handler.open_requests


def test_a_stream_comes_in_parts_that_add_up(make_handler, continuous, monkeypatch):
    frontend = make_handler(continuous)
    sent = []

    def send_part(bodies, request_ids, message, code, context):
        sent.extend(bodies[index] for index in request_ids)

    monkeypatch.setattr(service, "send_intermediate_predict_response", send_part)
    body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True}
    whole = frontend.answer(frontend.send(body))[1]["choices"][0]["text"]
    frontend.handler.settings = frontend.handler.settings.model_copy(update={"time_slice_ms": 1})
    other = frontend.send(instances("a"))
    streamed = frontend.send(body | {"stream": True})
    status, last = frontend.answer(streamed)
    parts = [*frontend.bodies[streamed][:-1], *sent]
    assert status == 200 and len([part for part in parts if part]) > 2
    events = "".join([*sent, last]).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    assert frontend.answer(other)[0] == 200


def test_a_full_queue_says_when_to_come_again(make_handler):
    frontend = make_handler(True)
    for count in (4, 7):  # 4 rows, 6 that wait, and one more
        sent = [frontend.send(instances(PROMPT, max_new_tokens=500)) for _ in range(count)]
        frontend.call()
    assert frontend.statuses[sent[-1]] == 429
    assert frontend.context.get_response_headers(10)["Retry-After"] == "1"


def test_a_request_that_waits_too_long_is_503_and_says_when_to_come_again(make_handler, monkeypatch):
    frontend = make_handler(True)
    for _ in range(4):
        frontend.send(instances(PROMPT, max_new_tokens=500))
    frontend.call()
    waiting = [frontend.send(instances(PROMPT)), frontend.send({"prompt": PROMPT, "stream": True})]
    frontend.call()
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 61)
    frontend.call()
    assert [frontend.statuses.get(one) for one in waiting] == [503, 503]
    assert [frontend.context.get_response_headers(index)["Retry-After"] for index in (4, 5)] == ["1", "1"]
    assert json.loads(frontend.bodies[waiting[1]][-1])["error"]["type"] == "queue_timeout"
    assert len(frontend.open) == 4  # those who run


@pytest.fixture
def reported(caplog):
    """reported(frontend) -> {name: what is new} of metrics without labels of their own, as TorchServe reads them."""
    caplog.set_level(logging.INFO)

    def reported(frontend):
        frontend.handler.metrics.report()
        line = re.compile(r"\[METRICS\](\w+)\.\w+:([0-9\-,.e]+)\|#model_name:bloom\|#type:\w+\|#hostname:[^,]+,\d+")
        found = [line.fullmatch(record.getMessage()) for record in caplog.records]
        caplog.clear()
        return {match[1]: float(match[2]) for match in found if match}

    return reported


def finished(caplog):
    """What the log says of finished requests."""
    return [json.loads(record.getMessage()) for record in caplog.records if '"event": "request"' in record.getMessage()]


def test_metrics_tell_what_runs_and_what_waits(make_handler, reported, caplog):
    frontend = make_handler(True)
    assert "llm_running_sequences.sequences:0|" in caplog.text  # before anybody has asked for anything
    sent = [frontend.send(instances(PROMPT, max_new_tokens=500)) for _ in range(6)]
    frontend.call()
    new = reported(frontend)
    assert (new["llm_running_sequences"], new["llm_waiting_sequences"]) == (4, 2)
    for one in sent:
        frontend.hang_up(one)
    frontend.answer(frontend.send(instances(PROMPT)))
    new = reported(frontend)
    assert (new["llm_running_sequences"], new["llm_waiting_sequences"]) == (0, 0)


def test_each_finished_request_is_a_line_without_its_prompt(make_handler, continuous, caplog):
    caplog.set_level(logging.INFO)
    frontend = make_handler(continuous)
    good = frontend.send({"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True})
    bad = frontend.send({"no": PROMPT})
    frontend.answer(good), frontend.answer(bad)
    lines = {line.pop("id"): line for line in finished(caplog)}
    assert lines.keys() == {good, bad} and PROMPT not in caplog.text
    times = [lines[good].pop(f"{name}_seconds") for name in ("queued", "first_token", "total")]
    assert 0 <= times[0] <= times[1] <= times[2]
    tokens = len(frontend.handler.loaded.tokenizer(PROMPT)["input_ids"])
    assert lines[good] == {
        "event": "request", "protocol": "openai_completions", "status": 200,
        "prompt_tokens": tokens, "generated_tokens": 5,
    }  # fmt: skip
    assert (lines[bad]["status"], lines[bad]["queued_seconds"], lines[bad]["generated_tokens"]) == (400, None, 0)


def test_a_client_that_hung_up_is_a_line_too(make_handler, caplog):
    caplog.set_level(logging.INFO)
    frontend = make_handler(True)
    gone = frontend.send(instances(PROMPT, max_new_tokens=500))
    frontend.call()
    frontend.hang_up(gone)
    frontend.answer(frontend.send({}, url_path="health"))
    (line,) = (line for line in finished(caplog) if line["id"] == gone)
    assert (line["status"], line["protocol"]) == (499, "kserve_v1") and line["generated_tokens"]


def test_what_comes_from_disk_is_told(make_handler, monkeypatch, reported):
    frontend = make_handler(True)
    assert frontend.answer(frontend.send({}, describe="True"))[1]["streaming"] is None
    monkeypatch.setattr(streaming, "SMALL_BYTES", 0)
    monkeypatch.setattr(speculation, "prompt_lookup", lambda token_ids, limit: [9] * limit)
    monkeypatch.setattr(service, "read_settings", lambda _: Settings(max_memory={"cpu": 0}, max_batch_size=4))
    frontend = make_handler(True)
    assert frontend.handler.loaded.streamed.page_cache_room() > 0
    assert frontend.handler.loaded.streamed.wait_seconds == 0
    read = frontend.handler.loaded.streamed.reader.bytes_read
    frontend.answer(frontend.send(instances(PROMPT, max_new_tokens=5)))
    told = frontend.answer(frontend.send({}, describe="True"))[1]["streaming"]
    disk = frontend.handler.loaded.placement.tiers["disk"].bytes
    assert told["bytes_read"] >= read + 4 * disk // 2
    assert told["page_cache_bytes"] == frontend.handler.loaded.streamed.page_cache_bytes > disk // 2
    assert told["method"] and told["measured_bytes_per_second"] > 0 and 0 < told["share_waited"] <= 1  # rounded
    assert told["accepted_draft_tokens"] <= told["draft_tokens"]
    new = reported(frontend)
    assert new["llm_streamed_bytes_total"] >= 4 * disk // 2
    assert 0 < new["llm_stream_wait_seconds_total"] < new["llm_forward_seconds_total"]
    assert frontend.handler.engine._runner.wait_seconds == frontend.handler.loaded.streamed.wait_seconds > 0
    assert new["llm_draft_tokens_total"] == frontend.handler.engine.speculator.num_drafted > 0
    assert new["llm_accepted_draft_tokens_total"] == frontend.handler.engine.speculator.num_accepted


def test_a_draft_model_is_used_and_told(make_handler, model_dir, draft_bloom, monkeypatch):
    monkeypatch.setattr(speculation, "prompt_lookup", lambda token_ids, limit: [])
    monkeypatch.setattr(service, "read_settings", lambda _: Settings(max_memory={"cpu": 250_000}, max_batch_size=4))
    plain = make_handler(True)
    assert plain.answer(plain.send({}, describe="True"))[1]["draft_model"] is None
    answer = plain.answer(plain.send(instances(PROMPT, max_new_tokens=9)))
    monkeypatch.setattr(service, "open_draft", lambda _: draft_bloom)
    frontend = make_handler(True)
    # A step takes a second, and a guess nothing, whatever they take here.
    speculator = frontend.handler.engine.speculator
    for cost, seconds in ((frontend.handler.engine._cost, 1.0), (speculator.draft_model._cost, 0.0)):
        cost.reading, cost.per_position, cost.record = seconds, 0.0, lambda *_: None
    assert frontend.answer(frontend.send(instances(PROMPT, max_new_tokens=9))) == answer
    told = frontend.answer(frontend.send({}, describe="True"))[1]
    assert told["draft_model"]["model_type"] == "bloom" and told["draft_model"]["in_use"]
    assert told["draft_model"]["memory_footprint"] < told["memory_footprint"]
    assert told["streaming"]["draft_tokens"] > 0


def test_describe(make_handler, continuous):
    frontend = make_handler(continuous)
    status, public = frontend.answer(frontend.send({}, url_path="describe"))
    schema = OPENAPI["paths"]["/predictions/{model}/{version}/describe"]["get"]["responses"]["200"]["content"]
    assert status == 200 and public.keys() == schema["application/json"]["schema"]["properties"].keys()
    assert public["max_sequence_length"] == 2048 and public["engine"] == {"running": 0, "waiting": 0}
    managed = frontend.send({}, describe="True")  # as the management API asks in plain mode
    status, described = frontend.answer(managed)
    assert status == 200 and described["dtype"] == "float32" and public.items() <= described.items()


def test_a_describe_header_of_a_client_changes_nothing(make_handler, continuous):
    frontend = make_handler(continuous)
    expected = frontend.answer(frontend.send(instances(PROMPT)))
    sent = [frontend.send(instances(PROMPT), describe=header, explain="False") for header in ("True", "", "True")]
    managed = frontend.send({}, describe="True")
    assert [frontend.answer(one) for one in sent] == [expected] * 3
    status, described = frontend.answer(managed)
    assert status == 200 and described["model_type"] == "bloom"


def test_the_garbage_collector_leaves_what_is_loaded_alone(make_handler):
    """Walking over all of it takes long, and happens in the middle of somebody's step."""
    gc.unfreeze()
    model = make_handler(True).handler.model
    assert not any(one is model for one in gc.get_objects())
