"""A plan for people: a table, and a picture."""

from pathlib import Path

from handler.memory import JAVA_BYTES

from .parallel import parallel
from .plan import Plan, gigabytes


def format_table(plan: Plan) -> str:
    """The plan as a table for people, and its verdict."""
    rows = [["", "has", "layers", "weights", "KV cache", "workspace", "runtime", "reserve", "left"]]
    for device in plan.devices:
        workspace = device.workspace + device.kv_copies
        sizes = [device.weights, device.kv_cache, workspace, device.runtime, device.reserve]
        left = "" if device.size is None else gigabytes(device.size - device.needed)
        has = "" if device.size is None else gigabytes(device.size)
        rows.append([device.name, has, str(device.layers), *(gigabytes(s) if s else "" for s in sizes), left])
    tokens = plan.kv_cache // plan.kv_bytes_per_token
    lines = [
        f"{plan.model}, {plan.dtype}, {gigabytes(plan.weights)} of weights",
        "",
        _aligned(rows),
        "",
        f"keys and values  {tokens:,} tokens of {plan.kv_bytes_per_token:,} bytes: "
        f"{plan.settings.max_batch_size} sequences of up to {plan.max_sequence_length:,} tokens",
        f"node's memory    {gigabytes(plan.memory_request)}, of it while loading {gigabytes(plan.loading)}",
        f"… the worker's   {_worker(plan)}; Java's {gigabytes(JAVA_BYTES)}, its heap full",
        f"node's disk      {gigabytes(plan.checkpoint_bytes)} for the archive, and in /tmp "
        f"{gigabytes(plan.disk_request())} for a .mar, {gigabytes(plan.disk_request('no-archive'))} for a folder",
    ]
    if plan.seconds_a_step:
        paths = ", ".join(
            f"{gigabytes(count)} over {path} at {getattr(plan.bandwidth, path) / 1e9:g} GB/s"
            for path, count in plan.streamed.items()
            if count
        )
        batch = plan.settings.max_batch_size
        lines.append(
            f"a step brings    {paths}: at most {plan.tokens_per_second():.3g} tok/s for one request, "
            f"{plan.tokens_per_second(batch):.3g} for {batch}"
        )
    if plan.offloaded:
        lines.append(
            f"batch            computing takes as long as that at {int(plan.balanced_rows):,} rows; recommended "
            f"with this memory: max_batch_size {plan.recommended_batch_size}"
        )
    for part in plan.parts:
        if part.name == "draft_model":
            lines.append(f"draft model      {gigabytes(part.bytes)} of the weights on {part.device}")
    idle = [device.name for device in plan.gpus if not device.needed]
    if idle:
        lines.append(f"idle             {', '.join(idle)}: max_memory in setup_config.json does not name it")
    lines += ["", f"verdict          {plan.verdict}"]
    other = parallel(plan)
    if other and (plan.missing or plan.offloaded):
        nodes = f"{other.pipeline} such node{'s' if other.pipeline > 1 else ''}"
        lines.append(f"all on GPUs      {nodes}, {other.tensor} GPUs each, on vLLM: make manifest VARIANT=distributed")
    return "\n".join(lines)


def _worker(plan: Plan) -> str:
    """What the worker takes before it serves, with one sequence, and with all that there are keys and values for."""
    ready, alone, full = map(gigabytes, (plan.ready, plan.serving[1], max(plan.serving.values())))
    return f"{ready} at READY, {alone} with one sequence, {full} with all keys and values"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def draw_picture(plan: Plan, path: Path) -> None:
    """Draw the layers on their devices; the suffix of `path` chooses the format (.svg, .png)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    colors = {"layers": "#4477aa", "outside": "#ccbb44", "KV cache": "#66ccee", "other": "#bbbbbb"}
    figure, axes = pyplot.subplots(figsize=(11, 1.4 + 0.7 * len(plan.devices)), layout="constrained")
    for row, device in enumerate(plan.devices):
        end = 0.0
        held = [part for part in plan.parts if part.device == device.name]
        blocks = [(part.bytes, "layers" if part.is_layer else "outside") for part in held]
        blocks += [(device.kv_cache, "KV cache"), (device.needed - device.weights - device.kv_cache, "other")]
        for count, kind in blocks:
            axes.barh(row, count / 1e9, left=end, color=colors[kind], edgecolor="white", linewidth=0.5)
            end += count / 1e9
        if device.size is not None:
            axes.plot([device.size / 1e9] * 2, [row - 0.45, row + 0.45], color="#ee6677", linewidth=2)
    labels = {"layers": "decoder layers", "outside": "embeddings, norms, head", "other": "workspace and runtime"}
    handles = [Patch(color=color, label=labels.get(kind, kind)) for kind, color in colors.items()]
    handles.append(Patch(color="#ee6677", label="what the device has"))
    axes.legend(
        handles=handles,
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )
    axes.set_yticks(range(len(plan.devices)), [device.name for device in plan.devices])
    axes.invert_yaxis()
    axes.set_xlabel("GB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{plan.model}, {plan.dtype}: {plan.verdict}", fontsize=10)
    figure.savefig(path)
    pyplot.close(figure)
