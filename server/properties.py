"""The text of a config.properties: KEY=VALUE lines. Only the standard library is imported, since the probes read it."""

from collections.abc import Mapping


def parse_properties(text: str) -> dict[str, str]:
    """The values of KEY=VALUE lines, without comments."""
    lines = [line.strip() for line in text.splitlines()]
    pairs = [line.split("=", 1) for line in lines if "=" in line and not line.startswith(("#", "!"))]
    return {key.strip(): value.strip() for key, value in pairs}


def format_properties(values: Mapping[str, object]) -> str:
    """KEY=VALUE lines."""
    return "".join(f"{key}={value}\n" for key, value in values.items())
