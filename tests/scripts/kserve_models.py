"""Hold manifests against the models of PyPI's kserve and kubernetes; print what they do not know, a line each.

Run with the Python of .venv-kserve; on standard input JSON, lists of documents by a name that comes first in the line.
"""

import json
import re
import sys

import kserve
from kubernetes import client

KINDS = {
    "InferenceService": "V1beta1InferenceService",
    "ServingRuntime": "V1alpha1ServingRuntime",
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "NetworkPolicy": "V1NetworkPolicy",
    "Secret": "V1Secret",
    "Job": "V1Job",
    "LLMInferenceService": "V1alpha1LLMInferenceService",
    "ServiceAccount": "V1ServiceAccount",
}


def problems(value, kind, path):
    """What a value of the type `kind`, as the models name it, has that the type does not."""
    inner = re.fullmatch(r"(list|dict)[\[(](?:str, ?)?(.+)[\])]", kind)
    model = getattr(kserve, kind, None)
    if inner:
        if not isinstance(value, list if inner[1] == "list" else dict):
            yield f"{path}: {value!r} is no {inner[1]}"
            return
        for key, item in enumerate(value) if inner[1] == "list" else value.items():
            yield from problems(item, inner[2], f"{path}.{key}")
    elif hasattr(model, "openapi_types"):
        names = {name: attribute for attribute, name in model.attribute_map.items()}
        for key in value.keys() - names.keys():
            yield f"{path}.{key}: unknown to {kind}"
        known = {names[key]: item for key, item in value.items() if key in names}
        model(**known)  # raises ValueError for what is required and missing
        for attribute, item in known.items():
            yield from problems(item, model.openapi_types[attribute], f"{path}.{model.attribute_map[attribute]}")
    elif model := getattr(client, kind, None):
        yield from lost(value, json.loads(model.from_dict(value).to_json()), path)


def lost(before, after, path):
    """What did not survive being read into a model of kubernetes."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, item in before.items():
            yield from lost(item, after.get(key), f"{path}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, item in enumerate(before):
            yield from lost(item, after[index], f"{path}.{index}")
    elif str(before) != str(after) and before not in ({}, []):
        yield f"{path}: {before!r} became {after!r}"


for name, documents in json.load(sys.stdin).items():
    for document in documents:
        if kind := KINDS.get(document["kind"]):
            print(*problems(document, kind, f"{name}: {document['kind']}"), sep="\n")
