"""What is handed on of the metrics, and when."""

import re
import time
from types import SimpleNamespace

import pytest
import yaml

from handler.engine import Engine, Request
from handler.loading import LoadedModel
from handler.metrics import HISTOGRAMS, METRICS, Metrics
from handler.weights.placement import Part, Placement
from scripts.archive import ROOT
from tests.engine.conftest import make_model, make_tokenizer


@pytest.fixture
def reports():
    """reports.report() -> {name, or (name, label values): value} of what was handed on."""
    engine = Engine(make_model("llama"), make_tokenizer())
    parts = [Part("model.layers.0", "cpu", 100), Part("model.layers.1", "disk", 200)]
    streamed = SimpleNamespace(reader=SimpleNamespace(bytes_read=0), wait_seconds=0.0)
    loaded = LoadedModel(None, None, {}, Placement(parts, "cpu"), streamed, "float32")
    emitted = []
    metrics = Metrics(engine, loaded, 2.5, lambda *sample: emitted.append(sample))

    def report():
        emitted.clear()
        metrics.report()
        return {(metric.name, *labels) if labels else metric.name: value for metric, labels, value in emitted}

    return SimpleNamespace(report=report, metrics=metrics, engine=engine, streamed=streamed)


def without_memory(report):
    """The process's memory changes when it likes."""
    return {name: value for name, value in report.items() if name != ("llm_memory_used_bytes", "cpu")}


def test_torchserves_file_registers_the_same():
    registered = yaml.safe_load((ROOT / "server/metrics.yaml").read_text())["model_metrics"]
    found = {
        (one["name"], kind, one["unit"], *one["dimensions"][1:])
        for kind, metrics in registered.items()
        for one in metrics
        if one["dimensions"][0] == "model_name"
    }
    assert found == {(metric.name, metric.type, metric.unit, *metric.labels) for metric in METRICS.values()}


def test_the_documentation_names_them_all():
    told = set(re.findall(r"llm_\w+", (ROOT / "docs/metrics.md").read_text()))
    assert told == {re.sub(r"_(bucket|sum|count)$", "", name) for name in METRICS}


def test_all_but_requests_is_there_from_the_beginning(reports):
    first = reports.report()
    names = {name if isinstance(name, str) else name[0] for name in first}
    assert names == METRICS.keys() - {"llm_requests_total"}
    assert first["llm_load_seconds"] == 2.5
    assert (first["llm_weights_bytes", "cpu"], first["llm_weights_bytes", "disk"]) == (100, 200)
    assert first["llm_memory_used_bytes", "cpu"] > 0
    assert first["llm_kv_cache_free_tokens"] == reports.engine.kv_tokens_free > 0


def test_then_what_has_changed_counters_by_how_much(reports):
    reports.report()
    assert not without_memory(reports.report())
    for count in (7, 12):
        reports.streamed.reader.bytes_read = count
        assert without_memory(reports.report()) == {"llm_streamed_bytes_total": 7 if count == 7 else 5}


def test_a_histogram_is_what_prometheus_has_it_as(reports):
    reports.report()
    for seconds in (0.02, 0.02, 7, 400):
        reports.engine.stats.between_tokens.observe(seconds)
    new = without_memory(reports.report())
    assert new.pop("llm_time_between_tokens_seconds_sum") == pytest.approx(407.04)
    assert new.pop("llm_time_between_tokens_seconds_count") == 4
    buckets = {bound: count for (_, bound), count in new.items()}
    bounds = ["0.025", "0.05", "0.1", "0.25", "0.5", "1", "2.5", "5", "10", "30", "60", "120", "300", "+Inf"]
    assert buckets == dict(zip(bounds, [2] * 8 + [3] * 5 + [4], strict=True))


def test_each_histogram_has_the_times_of_its_own(reports):
    reports.report()
    stats = reports.engine.stats
    for seconds, histogram in enumerate((stats.queue, stats.first_token, stats.between_tokens), start=1):
        histogram.observe(seconds)
    new = reports.report()
    assert [new[f"{name}_sum"] for name in HISTOGRAMS] == [1, 2, 3]


def test_requests_are_counted_by_protocol_and_status(reports):
    reports.report()
    job = SimpleNamespace(prompt_ids=[1], sequences=[], started_at=None, first_token_at=None)
    for protocol, status in [("openai_chat", 200), ("openai_chat", 200), ("kserve_v1", 429)]:
        request = SimpleNamespace(protocol=protocol, jobs=[job], received_at=time.monotonic())
        reports.metrics.finished("an id", request, status)
    new = without_memory(reports.report())
    assert new == {("llm_requests_total", "openai_chat", "200"): 2, ("llm_requests_total", "kserve_v1", "429"): 1}


def test_tokens_and_rows_are_told_while_the_engine_steps(reports):
    reports.report()
    job = reports.engine.submit(Request("one two three", {"max_new_tokens": 3, "min_new_tokens": 3}))
    reports.engine.step()
    new = reports.report()
    assert (new["llm_generated_tokens_total"], new["llm_prompt_tokens_total"]) == (1, len(job.prompt_ids))
    assert new["llm_running_sequences"] == 1 and new["llm_kv_cache_used_tokens"] == len(job.prompt_ids) + 1
    while not job.finished:
        reports.engine.step()
    new = reports.report()
    assert new["llm_generated_tokens_total"] == 2 and new["llm_running_sequences"] == 0


def test_a_report_that_fails_is_not_the_last(reports, monkeypatch, caplog):
    outcomes = iter([ValueError("once"), None, SystemExit()])

    def report():
        if outcome := next(outcomes):
            raise outcome

    monkeypatch.setattr(reports.metrics, "report", report)
    with pytest.raises(SystemExit):  # which ends the loop for this test
        reports.metrics.report_forever(0)
    assert "once" in caplog.text
