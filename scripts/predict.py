"""Send the sample's request to a served model and print the JSON answer."""

import argparse
import json
import sys
from typing import Any

import requests

from scripts.console import UserError, run
from scripts.demo_model import NAME as DEMO_NAME

TEXT = "My dog is cute"


def predict(url: str, model_name: str, text: str) -> Any:
    """The answer of KServe's v1 protocol, parsed. Raises UserError when there is none, or not a good one."""
    try:
        body = {"instances": [{"data": text}]}
        answer = requests.post(f"{url}/v1/models/{model_name}:predict", json=body, timeout=1800)
    except requests.RequestException as error:
        raise UserError(f"{url} does not answer ({type(error).__name__}): is it served? try make serve") from error
    if not answer.ok:
        raise UserError(f"{answer.status_code} {answer.reason}: {answer.text.strip()}")
    return answer.json()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="predict", description=__doc__)
    parser.add_argument("--model-name", default=DEMO_NAME, help=f"default: {DEMO_NAME}")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="default: http://127.0.0.1:8080")
    parser.add_argument("--text", default=TEXT, help=f"default: {TEXT!r}")
    args = parser.parse_args(argv)
    print(json.dumps(predict(args.url, args.model_name, args.text), ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(run(main))
