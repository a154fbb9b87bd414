"""What TorchServe calls: its requests in, its answers out."""

from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler

from handler.checkpoint import open_checkpoint, work_folder
from handler.loading import load_model
from handler.protocols import BadRequest, Call, parse
from handler.settings import read_settings

PACKAGES = ("torchserve", "torch", "transformers", "accelerate")


class LargeModelHandler(BaseHandler):
    """Serves a causal language model across GPUs, CPU and disk."""

    def initialize(self, context: Context) -> None:
        """Load the checkpoint in TorchServe's model folder as its setup_config.json says.

        Raises SettingsError, CheckpointError or LoadError; TorchServe then tries again, and logs each try.
        """
        model_dir = Path(context.system_properties["model_dir"])
        self.settings = read_settings(model_dir / "setup_config.json")
        self.loaded = load_model(open_checkpoint(model_dir), self.settings, work_folder(model_dir))
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
