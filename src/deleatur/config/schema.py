"""JSON Schema of params.yaml, for editors: names, meanings and bounds of all settings and installed plug-ins."""

from __future__ import annotations

from typing import Any

from deleatur.config.descriptions import DescribedJsonSchema
from deleatur.config.plugin_config import inlined
from deleatur.config.settings import Settings


def json_schema() -> dict[str, Any]:
    """Of params.yaml as a whole, without references."""
    schema = Settings.model_json_schema(by_alias=True, schema_generator=DescribedJsonSchema)
    resolved = inlined(schema, schema["$defs"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **resolved, "title": "deleatur params.yaml"}
