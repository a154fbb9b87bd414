"""gRPC, for which TorchServe needs plain mode: in continuous mode it drops a stream after its first part."""

import json

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tests.e2e.asking import ENDLESS, PROMPT, complete, joined

PACKAGE = "org.pytorch.serve.grpc.inference"


def messages():
    """The two messages of TorchServe's inference.proto that a prediction needs."""
    text, data = descriptor_pb2.FieldDescriptorProto.TYPE_STRING, descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    file = descriptor_pb2.FileDescriptorProto(name="inference.proto", package=PACKAGE, syntax="proto3")
    request = file.message_type.add(name="PredictionsRequest")
    request.field.add(name="model_name", number=1, type=text, label=1)
    request.field.add(name="model_version", number=2, type=text, label=1)
    entry = request.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=text, label=1)
    entry.field.add(name="value", number=2, type=data, label=1)
    request.field.add(
        name="input",
        number=3,
        label=3,
        type=descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE,
        type_name=f".{PACKAGE}.PredictionsRequest.InputEntry",
    )
    response = file.message_type.add(name="PredictionResponse")
    response.field.add(name="prediction", number=1, type=data, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = ("PredictionsRequest", "PredictionResponse")
    return (message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in names)


@pytest.fixture(scope="module")
def service(plain):
    request, response = messages()
    with grpc.insecure_channel(f"127.0.0.1:{plain.port + 3}") as channel:
        path = f"/{PACKAGE}.InferenceAPIsService"
        encoding = {
            "request_serializer": request.SerializeToString,
            "response_deserializer": response.FromString,
        }
        once = channel.unary_unary(f"{path}/Predictions", **encoding)
        stream = channel.unary_stream(f"{path}/StreamPredictions", **encoding)
        yield request, once, stream


def test_a_prediction(service, generated):
    request, once, _ = service
    answer = once(request(model_name="bloom", input={"data": PROMPT.encode()}), timeout=60)
    assert answer.prediction.decode() == generated()


def test_a_stream(service, plain):
    request, _, stream = service
    asked = {**ENDLESS, "max_tokens": 300}
    body = json.dumps({"prompt": PROMPT, **asked, "stream": True}).encode()
    parts = [part.prediction for part in stream(request(model_name="bloom", input={"body": body}), timeout=60)]
    assert len(parts) > 1
    *events, done, rest = b"".join(parts).decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    text = joined(json.loads(event.removeprefix("data: ")) for event in events)
    assert text == complete(plain.url, **asked).json()["choices"][0]["text"]
