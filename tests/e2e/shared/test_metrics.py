"""What Prometheus scrapes of the real TorchServe, and what its log says."""

import concurrent.futures
import json
import re
import time

import requests
import yaml

from scripts.archive import ROOT
from tests.e2e.asking import PROMPT, complete, predict, start_endless

NAMES = re.compile(r"(\w+)(?=[{\[])")  # of the metrics in an expression


def scrape(server):
    return requests.get(f"http://127.0.0.1:{server.port + 2}/metrics", timeout=20).text


def value(server, name, labels=""):
    """A sample's value; None before the first report. labels: as they follow the model's name."""
    found = re.search(
        rf'^{name}{{model_name="bloom",{re.escape(labels)}Hostname="[^"]*",}} (\S+)$', scrape(server), re.M
    )
    return found and float(found[1])


def wait_for(server, name, expected, labels=""):
    deadline = time.monotonic() + 60
    while (found := value(server, name, labels)) != expected:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def logged(server, request_ids):
    """The statuses with which the log says that these requests have ended, once it does."""
    deadline, found = time.monotonic() + 60, {}
    while not found.keys() >= set(request_ids):
        assert time.monotonic() < deadline, found
        text = (server.logs / "model_log.log").read_text()
        lines = [json.loads(line) for line in re.findall(r'MODEL_LOG - ({"event": "request".*})$', text, re.M)]
        found = {line["id"]: line["status"] for line in lines}
    return [found[request_id] for request_id in request_ids]


def test_what_runs_and_what_waits(continuous):
    open_ones = [start_endless(continuous, stream=True)[0] for _ in range(4)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(predict, continuous.url, PROMPT, max_new_tokens=4) for _ in range(2)]
        wait_for(continuous, "llm_waiting_sequences", 2)
        wait_for(continuous, "llm_running_sequences", 4)
        for connection in open_ones:
            connection.close()
        assert all(future.result().ok for future in waiting)
    wait_for(continuous, "llm_running_sequences", 0)
    wait_for(continuous, "llm_waiting_sequences", 0)


def test_requests_tokens_and_times(offloaded):
    tokens = "llm_time_between_tokens_seconds"
    grows = {
        ("llm_requests_total", 'protocol="openai_completions",status="200",'): 1,
        ("llm_generated_tokens_total", ""): 5,
        (f"{tokens}_bucket", 'le="+Inf",'): 4,
        (f"{tokens}_count", ""): 4,
    }
    before = {key: value(offloaded, *key) or 0 for key in grows}
    assert complete(offloaded.url, max_tokens=5, ignore_eos=True).ok
    for (name, labels), growth in grows.items():
        wait_for(offloaded, name, before[name, labels] + growth, labels)
    assert value(offloaded, "llm_weights_bytes", 'tier="disk",') > value(offloaded, "llm_weights_bytes", 'tier="cpu",')


def test_what_asks_for_metrics_asks_for_names_that_are_there(continuous):
    assert predict(continuous.url, PROMPT, max_new_tokens=1).ok
    wait_for(continuous, "llm_running_sequences", 0)
    exported = set(re.findall(r"^# TYPE (\w+) ", scrape(continuous), re.M))
    dashboard = json.loads((ROOT / "deploy/dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    monitoring = yaml.safe_load((ROOT / "deploy/variants/monitoring.yaml").read_text())
    (rules,) = (one for one in monitoring["documents"] if one["kind"] == "PrometheusRule")
    expressions += [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    asked = {name for expression in expressions for name in NAMES.findall(expression)}
    (model,) = (one for one in dashboard["templating"]["list"] if one["name"] == "model")
    asked |= set(re.findall(r"label_values\((\w+),", model["query"]["query"]))
    registered = yaml.safe_load((ROOT / "server/metrics.yaml").read_text())
    assert len(asked) > 15 and asked <= exported
    assert {one["name"] for kind in registered["model_metrics"].values() for one in kind} <= exported


def test_the_log_has_a_request_by_the_id_that_its_client_got(continuous):
    secret = "a prompt that nobody may read"
    answers = [complete(continuous.url, prompt=secret, max_tokens=3, stream=stream) for stream in (False, True)]
    answers.append(predict(continuous.url, secret, no_such=1))
    assert [answer.status_code for answer in answers] == [200, 200, 400] and all(answer.content for answer in answers)
    assert logged(continuous, [answer.headers["x-request-id"] for answer in answers]) == [200, 200, 400]
    everything = "".join(path.read_text() for path in (*continuous.logs.iterdir(), continuous.work / "console.log"))
    assert secret not in everything
    # TorchServe's own line for each metric and for each call would hide these.
    assert "[METRICS]" not in everything and "Backend received inference" not in everything
