"""What TorchServe calls: its requests in, its answers out."""

from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler

from handler.checkpoint import open_checkpoint
from handler.loading import load_model
from handler.settings import read_settings

PACKAGES = ("torchserve", "torch", "transformers", "accelerate")


class BadRequest(ValueError):
    """The request cannot be served as it is; the message says what to send instead."""


@dataclass(frozen=True)
class Call:
    """The prompts of one request, and whether it is a KServe v1 one with its list of instances."""

    prompts: list[str]
    v1: bool


def parse(entry: dict) -> Call:
    """What TorchServe hands over for one request -> its prompts. Raises BadRequest."""
    body = entry.get("body", entry.get("data"))
    if not entry:
        raise BadRequest("the body did not arrive: `curl -d` needs -H 'Content-Type: application/json'")
    if isinstance(body, bytes | bytearray):
        try:
            body = body.decode()
        except UnicodeDecodeError as error:
            raise BadRequest(f"the body is not UTF-8 text: {error}") from None
    if isinstance(body, dict) and isinstance(body.get("instances"), list) and body["instances"]:
        return Call([_instance(instance) for instance in body["instances"]], v1=True)
    if isinstance(body, dict) and isinstance(body.get("data"), str):
        body = body["data"]
    if isinstance(body, str) and body:
        return Call([body], v1=False)
    raise BadRequest('send text, or {"instances": ["…"]} as application/json')


def _instance(instance: Any) -> str:
    text = instance.get("data") if isinstance(instance, dict) else instance
    if not isinstance(text, str) or not text:
        raise BadRequest('each of "instances" must be a non-empty string or {"data": "…"}')
    return text


class LargeModelHandler(BaseHandler):
    """Serves a causal language model across GPUs, CPU and disk."""

    def initialize(self, context: Context) -> None:
        """Load the checkpoint in TorchServe's model folder as its setup_config.json says.

        Raises SettingsError, CheckpointError or LoadError; TorchServe then tries again, and logs each try.
        """
        model_dir = Path(context.system_properties["model_dir"])
        self.settings = read_settings(model_dir / "setup_config.json")
        work_folder = model_dir.parent if model_dir.is_symlink() else model_dir
        self.loaded = load_model(open_checkpoint(model_dir), self.settings, work_folder)
        self.model, self.tokenizer = self.loaded.model, self.loaded.tokenizer
        self.initialized = True

    def handle(self, data: list[dict], context: Context) -> list[Any]:
        """Answer a batch: one entry a request, in order. A request that is wrong gets its own 400."""
        self.context = context
        if self._is_describe():
            return [self.describe_handle()]
        calls = self.preprocess(data)
        return self.postprocess(calls, self.inference(calls))

    def preprocess(self, data: list[dict]) -> list[Call | BadRequest]:
        """The prompts of each request, or what is wrong with it."""
        calls: list[Call | BadRequest] = []
        for entry in data:
            try:
                calls.append(parse(entry))
            except BadRequest as error:
                calls.append(error)
        return calls

    def inference(self, calls: list[Call | BadRequest]) -> list[list[str]]:
        """The texts that answer each request's prompts; none for a request that is wrong."""
        counts = [len(call.prompts) if isinstance(call, Call) else 0 for call in calls]
        prompts = [prompt for call in calls if isinstance(call, Call) for prompt in call.prompts]
        size = self.settings.max_batch_size
        batches = (prompts[start : start + size] for start in range(0, len(prompts), size))
        texts = (text for batch in batches for text in self._generate(batch))
        return [list(islice(texts, count)) for count in counts]

    def postprocess(self, calls: list[Call | BadRequest], texts: list[list[str]]) -> list[Any]:
        """TorchServe's answers, with the status of each."""
        answers: list[Any] = []
        for index, (call, answer) in enumerate(zip(calls, texts, strict=True)):
            if isinstance(call, BadRequest):
                self.context.set_response_status(400, "Bad Request", index)
                answers.append({"error": {"code": 400, "message": str(call), "type": "BadRequestError"}})
            else:
                answers.append({"predictions": answer} if call.v1 else answer[0])
        return answers

    def _generate(self, prompts: list[str]) -> list[str]:
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        inputs = inputs.to(self.model.device if self.model.device.type != "meta" else "cpu")
        options = {"do_sample": False, "max_new_tokens": self.settings.max_new_tokens} | self.settings.generation
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **options)
        if not self.settings.return_full_text:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def describe_handle(self) -> dict[str, Any]:
        """The model as it is loaded: where its layers are, its dtype, its size in bytes, and the versions."""
        return {
            "model_type": self.model.config.model_type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "memory_footprint": self.model.get_memory_footprint(),
            "device_map": self.loaded.device_map,
            "tiers": {device: vars(tier) for device, tier in self.loaded.tiers.items()},
            "versions": {package: version(package) for package in PACKAGES},
        }
