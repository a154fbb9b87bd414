"""Where each layer of a checkpoint will go, whether that fits and how fast it can be, before anything is loaded."""

import argparse
import json
import sys
from pathlib import Path

from handler.settings import read_settings
from scripts.archive import ROOT
from scripts.console import UserError, parse_gpus, parse_size_option, run

from . import Bandwidth, make_plan
from .remedies import remedies
from .report import draw_picture, format_table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="plan", description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True, help="a checkpoint, or a folder with its config.json")
    parser.add_argument("--draft-model", type=Path, help="a small checkpoint that guesses tokens, as for make archive")
    parser.add_argument("--gpus", help="2x16GiB; 16GiB,24GiB; 0 for none; without it those of max_memory")
    parser.add_argument("--cpu", help="the node's memory, such as 32GiB; without it as much as needed")
    parser.add_argument("--setup-config", type=Path, default=ROOT / "setup_config.json")
    parser.add_argument("--disk-bandwidth", default="1GB", help="bytes a second (default: %(default)s)")
    parser.add_argument("--pcie-bandwidth", default="12GB", help="bytes a second (default: %(default)s)")
    parser.add_argument("--ram-bandwidth", default="40GB", help="bytes a second (default: %(default)s)")
    parser.add_argument("--tflops", type=float, help="10^12 operations a second (default: 0.1 on a CPU, 50 on a GPU)")
    parser.add_argument("--json", type=Path, help="write the plan here as JSON")
    parser.add_argument("--picture", type=Path, help="draw the plan here: .svg or .png")
    args = parser.parse_args(argv)
    if not args.setup_config.is_file():
        raise UserError(f"{args.setup_config} does not exist: name the setup_config.json to plan for")
    gpus = None if args.gpus is None else parse_gpus(args.gpus)
    cpu = None if args.cpu is None else parse_size_option("CPU", args.cpu)
    speeds = {name: parse_size_option(name, getattr(args, f"{name}_bandwidth")) for name in ("disk", "pcie", "ram")}
    if args.tflops is not None and not args.tflops > 0:
        raise UserError("--tflops must be more than 0, such as 0.1")
    bandwidth = Bandwidth(**speeds, flops=args.tflops and args.tflops * 1e12)
    plan = make_plan(args.model_dir, read_settings(args.setup_config), gpus, cpu, bandwidth, args.draft_model)
    print(format_table(plan))
    for remedy in remedies(plan, args.model_dir, args.draft_model):
        print(f"                 {remedy}")
    if args.json:
        args.json.write_text(json.dumps(plan.as_json(), indent=2) + "\n")
    if args.picture:
        draw_picture(plan, args.picture)
    if written := [str(path) for path in (args.json, args.picture) if path]:
        print(f"\nwrote {' and '.join(written)}")


if __name__ == "__main__":
    sys.exit(run(main))
