"""What the manifests are made of: a base in deploy/, and files in deploy/variants that change it and add documents."""

from typing import Any

import yaml

from scripts.archive import ROOT
from scripts.console import UserError

DEPLOY = ROOT / "deploy"
BASES = {  # what each is made of; the last document is the service
    "runtime": ["network-policy.yaml", "runtime.yaml", "inference-service.yaml"],
    "knative": ["network-policy.yaml", "runtime.yaml", "knative.yaml"],
    "classic": ["network-policy.yaml", "classic.yaml"],
    "distributed": ["distributed.yaml"],
    "llm": ["llm.yaml"],
}
ON_VLLM = ("distributed", "llm")
LEAST_KSERVE_OF = {"local-cache": "0.15", "keda": "0.16", "distributed": "0.16", "llm": "0.16"}


def variants() -> list[str]:
    return [*BASES, *sorted(path.stem for path in (DEPLOY / "variants").glob("*.yaml"))]


def choose(variant: str) -> tuple[str, list[str]]:
    """The base that a choice of variants runs on, and those that change it."""
    chosen: list[str] = []
    for name in variant.replace(" ", "").split(","):
        if name not in variants():
            raise UserError(f"VARIANT is {variant!r}: {name!r} is none of {', '.join(variants())}")
        chosen += [one for one in [*_implied(name), name] if one not in chosen]
    bases = [name for name in chosen if name in BASES]
    chosen = [name for name in chosen if name not in BASES]
    allowed = bases[:1] or list(BASES)
    for name in chosen:
        allowed = [base for base in allowed if base in _variant(name)["bases"]]
    if not allowed or len(bases) > 1:
        runs_on = [f"{name} on {' or '.join(_variant(name)['bases'])}" for name in chosen]
        raise UserError(f"VARIANT is {variant!r}, which does not go together: {', '.join([*bases, *runs_on])}")
    return allowed[0], chosen


def _variant(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / f"variants/{name}.yaml").read_text())


def _implied(name: str) -> list[str]:
    return [] if name in BASES else _variant(name).get("with", [])
