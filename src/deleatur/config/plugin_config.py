"""Plug-ins in params.yaml: their hyperparameters are validated where the file is read, whichever package they are of.

A plug-in's own class declares its hyperparameters, with defaults, bounds and meanings; nothing is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from deleatur import plugins
from deleatur.errors import SettingsError

T = TypeVar("T")

Hyperparameters = dict[str, Any]
"""Values given for one plug-in by name; its class validates them and fills in the others."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Errors:
    """Collects the errors of several validations, so that one message names all of them."""

    def __init__(self) -> None:
        self._details: list[InitErrorDetails] = []

    def collect(self, location: tuple[str, ...], function: Callable[..., T], *args: Any) -> T | None:
        """Calls a function that validates. Its errors are kept, below `location`."""
        try:
            return function(*args)
        except ValidationError as e:
            for error in e.errors(include_url=False):
                # The message is final, and the type names it: types of pydantic's own want their context back.
                kind = PydanticCustomError("invalid", "{message}", {"message": error["msg"]})
                self._details.append({"type": kind, "loc": (*location, *error["loc"]), "input": error["input"]})
        except SettingsError as e:
            kind = PydanticCustomError("invalid", "{message}", {"message": str(e)})
            self._details.append({"type": kind, "loc": location, "input": {}})
        return None

    def raise_any(self, title: str) -> None:
        if self._details:
            raise ValidationError.from_exception_data(title, self._details)


def validate(kind: str, name: Any, values: Any) -> BaseModel:
    """The plug-in `name` of a kind with its hyperparameters.

    Raises ValidationError naming each wrong value, SettingsError when there is no such plug-in or it does not load.
    """
    if name not in (known := plugins.names(kind)):
        raise SettingsError(f"expected one of {', '.join(known)} ({kind}), got {name!r}")
    if not isinstance(values, Mapping):
        raise SettingsError(f"expected the hyperparameters of {name}, {{name: value}}, got {values!r}")
    return plugins.load(kind, name, plugins.base(kind)).model_validate(values)


class PluginSection(Section):
    """Selects one plug-in of a kind in `method`. Its hyperparameters, and those of others, are given under their own
    names: to use another method, change `method` and nothing else.
    """

    model_config = ConfigDict(extra="allow")
    kind: ClassVar[str]
    method: str
    """Name of the plug-in; `deleatur methods` lists them."""

    @model_validator(mode="wrap")
    @classmethod
    def hyperparameters_are_valid(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, Mapping):
            return handler(values)
        errors = Errors()
        section = errors.collect((), handler, values)
        configs = {name: config for name, config in values.items() if name not in cls.model_fields}
        if section is not None:
            configs = {section.method: {}} | configs
        for name, config in configs.items():
            errors.collect((name if name in values else "method",), validate, cls.kind, name, config)
        errors.raise_any(cls.__name__)
        assert section is not None
        return section

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        resolved = handler.resolve_ref_schema(handler(schema))
        resolved["properties"]["method"]["enum"] = plugins.names(cls.kind)
        resolved["properties"] |= {name: schema_of(cls.kind, name) for name in plugins.names(cls.kind)}
        return resolved | {"additionalProperties": False}

    @property
    def configured(self) -> tuple[str, ...]:
        """The selected method, then others whose hyperparameters are given."""
        return tuple(dict.fromkeys([self.method, *(self.model_extra or {})]))

    def config(self, method: str) -> Hyperparameters:
        """The hyperparameters given for a method, without its defaults."""
        return dict((self.model_extra or {}).get(method, {}))


def _by_method(kind: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Validates plug-ins that are all used, by name."""

    def validator(configs: dict[str, Any]) -> dict[str, Any]:
        errors = Errors()
        for name, config in configs.items():
            errors.collect((name,), validate, kind, name, config)
        errors.raise_any(kind)
        return configs

    return validator


def _by_alias(kind: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Validates plug-ins that are all used, under names of the user's: `method`, and hyperparameters beside it."""

    def validator(configs: dict[str, Any]) -> dict[str, Any]:
        errors = Errors()
        for name, config in configs.items():
            values = {key: value for key, value in config.items() if key != "method"}
            errors.collect((name,), validate, kind, config.get("method"), values)
        errors.raise_any(kind)
        return configs

    return validator


def schema_of(kind: str, name: str) -> JsonSchemaValue:
    """JSON Schema of one plug-in's hyperparameters, without references; a plug-in that does not load has none."""
    try:
        plugin = plugins.load(kind, name, plugins.base(kind))
    except SettingsError:
        return {"type": "object"}
    schema = plugin.model_json_schema()
    return dict(inlined(schema, schema.get("$defs", {})))


def inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """A JSON Schema with each reference replaced by what it refers to."""
    if isinstance(schema, list):
        return [inlined(each, definitions) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    if reference := schema.get("$ref"):
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        return inlined(definitions[reference.rpartition("/")[2]] | beside, definitions)
    return {key: inlined(value, definitions) for key, value in schema.items() if key != "$defs"}


class _Schemas:
    """Built when it is asked for: it imports every plug-in of a kind."""

    def __init__(self, kind: str, *, named: bool) -> None:
        self.kind, self.named = kind, named

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schemas = {name: schema_of(self.kind, name) for name in plugins.names(self.kind)}
        if not self.named:
            return {"type": "object", "properties": schemas, "additionalProperties": False}
        choices = [_with_method(name, schema) for name, schema in schemas.items()]
        return {"type": "object", "additionalProperties": {"oneOf": choices}}

    def __hash__(self) -> int:
        return hash((self.kind, self.named))


def _with_method(name: str, schema: JsonSchemaValue) -> JsonSchemaValue:
    properties = {"method": {"const": name}} | schema.get("properties", {})
    return schema | {"properties": properties, "required": ["method", *schema.get("required", [])]}


Attacks = Annotated[dict[str, Hyperparameters], AfterValidator(_by_method("attacks")), _Schemas("attacks", named=False)]
Detectors = Annotated[
    dict[str, Hyperparameters], AfterValidator(_by_alias("detectors")), _Schemas("detectors", named=True)
]
Metrics = Annotated[dict[str, Hyperparameters], AfterValidator(_by_alias("metrics")), _Schemas("metrics", named=True)]
