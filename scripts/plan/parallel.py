"""How many GPUs and nodes a model needs where all of it stays on GPUs: on vLLM, tensor parallel in a node and pipeline
parallel over nodes."""

import math
from dataclasses import dataclass

from .plan import Plan

GPU_SHARE = 0.9  # of a GPU that vLLM takes: gpu_memory_utilization's default
ACTIVATION_BYTES = 2_000_000_000  # on each GPU beside weights, keys and values: CUDA graphs, context; a round figure


@dataclass(frozen=True)
class Parallel:
    """tensor: GPUs of a node that compute each layer together. pipeline: nodes, each with some of the layers.
    gpu_bytes: what each GPU has to hold."""

    tensor: int
    pipeline: int
    gpu_bytes: int


def parallel(plan: Plan) -> Parallel | None:
    """The fewest nodes of the plan's GPUs that hold the weights and one sequence of full length; None if no number
    does, or if the plan has no GPUs of a known size."""
    sizes = [device.size for device in plan.gpus]
    smallest = min((size for size in sizes if size is not None), default=0)
    if not sizes or None in sizes:
        return None
    # Heads must be dealt out evenly, and keys and values with them.
    tensor = max(count for count in range(1, len(sizes) + 1) if plan.head_groups % count == 0)
    shared = plan.weights + plan.max_sequence_length * plan.kv_bytes_per_token
    room = smallest * GPU_SHARE - ACTIVATION_BYTES
    if room <= 0:
        return None
    pipeline = math.ceil(shared / (tensor * room))
    layers = sum(part.is_layer for part in plan.parts)
    if pipeline > layers:
        return None
    return Parallel(tensor, pipeline, shared // (tensor * pipeline) + ACTIVATION_BYTES)
