"""Plug-ins in params.yaml: their hyperparameters are validated where the file is read, whichever package they are of.

A plug-in's own class declares its hyperparameters, with defaults, bounds and meanings; nothing is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

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
from deleatur.config.descriptions import DescribedJsonSchema
from deleatur.errors import SettingsError

T = TypeVar("T")

Hyperparameters = dict[str, Any]
"""Values given for one plug-in by name; its class validates them and fills in the others."""


UNKNOWN_KEY: Literal["unknown_key"] = "unknown_key"
"""Type of the error about a key that does not exist."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Errors:
    """Collects the errors of several validations, so that one message names all of them.

    model: what is validated; an unknown key is compared with the keys that it has in that place.
    """

    def __init__(self, model: type[BaseModel] | None = None) -> None:
        self._model = model
        self._details: list[InitErrorDetails] = []

    def collect(self, location: tuple[str, ...], function: Callable[..., T], *args: Any) -> T | None:
        """Calls a function that validates. Its errors are kept, below `location`."""
        try:
            return function(*args)
        except ValidationError as e:
            for error in e.errors(include_url=False):
                message = self._unknown_key(*error["loc"]) if error["type"] == "extra_forbidden" else error["msg"]
                # The message is final, and the type names it: types of pydantic's own want their context back.
                name = UNKNOWN_KEY if error["type"] in ("extra_forbidden", UNKNOWN_KEY) else "invalid"
                kind = PydanticCustomError(name, "{message}", {"message": message})
                self._details.append({"type": kind, "loc": (*location, *error["loc"]), "input": error["input"]})
        except SettingsError as e:
            kind = PydanticCustomError("invalid", "{message}", {"message": str(e)})
            self._details.append({"type": kind, "loc": location, "input": {}})
        return None

    def _unknown_key(self, *location: int | str) -> str:
        keys = known_keys(self._model, location[:-1])
        near = get_close_matches(str(location[-1]), keys, 1)
        return f"no such key; closest: {near[0]}" if near else f"no such key; expected one of {', '.join(keys)}"

    def raise_any(self, title: str) -> None:
        if self._details:
            raise ValidationError.from_exception_data(title, self._details)


def known_keys(annotation: Any, location: Sequence[int | str]) -> list[str]:
    """The keys that a type has at a location below it: of a model, of a collection of models, or of an optional one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
        return known_keys(fields.get(str(location[0])), location[1:]) if location else list(fields)
    arguments = get_args(annotation)
    if get_origin(annotation) in (dict, list, tuple):
        return known_keys(arguments[get_origin(annotation) is dict], location[1:])
    return [key for argument in arguments for key in known_keys(argument, location)]


def validate(kind: str, name: Any, values: Any) -> BaseModel:
    """The plug-in `name` of a kind with its hyperparameters.

    Raises ValidationError naming each wrong value, SettingsError when there is no such plug-in or it does not load.
    """
    if name not in (known := plugins.names(kind)):
        raise SettingsError(f"expected one of {', '.join(known)} ({kind}), got {name!r}")
    if not isinstance(values, Mapping):
        raise SettingsError(f"expected the hyperparameters of {name}, {{name: value}}, got {values!r}")
    plugin = plugins.load(kind, name, plugins.base(kind))
    errors = Errors(plugin)
    validated = errors.collect((), plugin.model_validate, values)
    errors.raise_any(plugin.__name__)
    assert validated is not None
    return validated


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
    schema = plugin.model_json_schema(schema_generator=DescribedJsonSchema)
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
