import pytest

from handler.engine import Request

PROMPT = "My dog is cute"


def infer(data, shape=None, **rest):
    tensor = {"name": "text", "shape": shape or [len(data)], "datatype": "BYTES", "data": data}
    return {"inputs": [tensor], **rest}


@pytest.mark.parametrize(
    "entry", [{"body": PROMPT}, {"body": bytearray(PROMPT.encode())}, {"data": PROMPT}, {"body": {"data": PROMPT}}]
)
def test_text(send, generate, entry):
    assert send(None, entry=entry)[:2] == (200, PROMPT + generate(PROMPT))


def test_bytes_that_are_json(send, generate):
    body = bytearray(b' {"instances": ["My dog is cute"]}')
    assert send(body)[:2] == (200, {"predictions": [PROMPT + generate(PROMPT)]})


def test_predictions_are_in_order(send, generate):
    status, body, _ = send({"instances": [PROMPT, {"data": "東京"}, "a"]})
    assert (status, body) == (200, {"predictions": [text + generate(text) for text in (PROMPT, "東京", "a")]})


def test_parameters(send, generate):
    parameters = {"max_new_tokens": 3, "return_full_text": False}
    assert send({"instances": [PROMPT], "parameters": parameters})[1] == {"predictions": [generate(PROMPT, 3)]}


def test_several_sequences_an_instance(send):
    parameters = {"num_return_sequences": 2, "do_sample": True, "seed": 7}
    first = send({"instances": [PROMPT, "a"], "parameters": parameters})[1]["predictions"]
    assert [len(several) for several in first] == [2, 2] and first[0][0] != first[0][1]
    assert send({"instances": [PROMPT, "a"], "parameters": parameters})[1]["predictions"] == first


@pytest.mark.parametrize(
    "body, says",
    [
        ({"instances": []}, "instances"),
        ({"instances": PROMPT}, "instances"),
        ({"instances": [1]}, "instances.0"),
        ({"instances": [{"text": PROMPT}]}, "instances.0"),
        ({"instances": [PROMPT], "signature": "x"}, "signature"),
        ({"instances": [PROMPT], "parameters": {"temprature": 1}}, "temprature"),
        ({"instances": [PROMPT], "parameters": {"num_beams": 4}}, "num_beams"),
        ({"instances": [PROMPT], "parameters": {"max_new_tokens": "many"}}, "max_new_tokens"),
        ({"instances": [PROMPT], "parameters": {"return_full_text": "false"}}, "return_full_text"),
        ({"instances": [PROMPT], "parameters": {"return_full_text": 0}}, "return_full_text"),
        (infer([PROMPT], parameters={"return_full_text": "false"}), "return_full_text"),
        (infer([PROMPT], [10**400]), "shape"),
        (infer([PROMPT], [1] * 10_000), "shape"),
        ({"data": 3}, "data"),
        ({"text": PROMPT}, "instances"),
        (infer([PROMPT], [2]), "shape"),
        (infer([1]), "strings"),
        (infer([], [0]), "at least one"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [{"name": "t", "shape": [1], "datatype": "FP32", "data": [1.0]}]}, "datatype"),
        ({"inputs": [{**infer([PROMPT])["inputs"][0], "parameters": {"binary_data_size": 4}}]}, "binary data"),
        (infer([PROMPT], parameters={"binary_data_output": True}), "binary_data_output"),
        (infer([PROMPT], outputs=[{"name": "predictions", "parameters": {"binary_data": True}}]), "binary_data"),
        (infer([PROMPT], outputs=[{"name": "logits"}]), "logits"),
        (infer([PROMPT], model_name="gpt2"), "gpt2"),
    ],
)
def test_what_is_wrong_is_a_400_that_names_it(send, body, says):
    status, answer, _ = send(body)
    assert status == 400 and answer["error"].keys() == {"code", "message", "type"}
    assert says in answer["error"]["message"]


def test_open_inference(send, generate):
    parameters = {"max_new_tokens": 4}
    status, body, _ = send(infer([[PROMPT], ["a"]], [2, 1], id="seven", model_name="bloom", parameters=parameters))
    texts = [text + generate(text, 4) for text in (PROMPT, "a")]
    tensor = {"name": "predictions", "shape": [2, 1], "datatype": "BYTES", "data": texts}
    assert status == 200
    assert body == {"id": "seven", "model_name": "bloom", "model_version": "1.0", "outputs": [tensor]}


def test_open_inference_with_several_sequences(send):
    parameters = {"num_return_sequences": 3, "do_sample": True, "seed": 1}
    body = send(infer([PROMPT, "a"], outputs=[{"name": "predictions"}], parameters=parameters))[1]
    assert body["outputs"][0]["shape"] == [2, 3] and len(body["outputs"][0]["data"]) == 6
    assert "id" not in body


@pytest.mark.parametrize(
    "body, says",
    [
        (bytearray(b""), "empty"),
        (bytearray(b"\xff"), "UTF-8"),
        ([1, 2], "JSON object"),
        (17, "JSON object"),
        (None, "empty"),
    ],
)
def test_bodies_that_are_nothing(send, body, says):
    status, answer, _ = send(body)
    assert status == 400 and says in answer["error"]["message"]


def test_a_prompt_that_is_too_long(send):
    status, answer, _ = send("x" * 150)
    assert status == 413 and "150" in answer["error"]["message"] and "100" in answer["error"]["message"]


def test_a_request_with_one_bad_prompt_leaves_nothing_behind(send, engine):
    assert send({"instances": [PROMPT, "x" * 150]})[0] == 413
    engine.step()
    assert not engine.has_work


def test_a_full_queue(send, engine):
    for _ in range(8):
        engine.submit(Request("a", {"max_new_tokens": 100}))
    status, answer, headers = send({"instances": [PROMPT]})
    assert status == 429 and headers == {"Retry-After": "1"} and answer["error"]["type"] == "queue_full"


def test_a_deadline(send):
    status, answer, _ = send({"instances": [PROMPT], "parameters": {"max_time": 0.001, "max_new_tokens": 1900}})
    assert status == 408 and "0.001 s" in answer["error"]["message"]


def test_information(send):
    assert send(None, "health")[:2] == (200, {"status": "ok"})
    assert send(None, "describe")[:2] == (200, {"dtype": "float32"})
    status, answer, _ = send({"prompt": PROMPT}, "v2/completions")
    assert status == 404 and "v1/completions" in answer["error"]["message"]


def test_a_fault_of_ours_is_a_500_for_that_request_alone(send, engine, served, monkeypatch):
    from handler.protocols.plain_text import TextCall

    with monkeypatch.context() as broken:
        broken.setattr(TextCall, "render", lambda *_: 1 / 0)
        status, answer, _ = send(PROMPT)
    assert status == 500 and "ZeroDivisionError" in answer["error"]["message"]
    assert send(PROMPT)[0] == 200
