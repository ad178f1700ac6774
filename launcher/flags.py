"""Command-line flags made from a settings class, so that settings stay the single source."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from baton.settings import BYTES, Settings, load_settings

Result = TypeVar("Result")
Config = Annotated[Path | None, typer.Option(help="YAML file with settings; flags and BATON_* variables win over it")]


def takes_settings(
    kind: type[Settings], aliases: dict[str, str] | None = None, hidden: frozenset[str] = frozenset()
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Turns `f(settings, ...)` into a command with a flag for each of the settings' fields, and `--config`.

    `aliases` gives fields a second, shorter flag; `hidden` fields have none, nor have those that hold further fields,
    nor secrets, which would be seen in the list of processes.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        shown = {name: field for name, field in kind.model_fields.items() if name not in hidden}
        fields = {
            name: field for name, field in shown.items() if not is_nested(field) and value_type(field) is not SecretStr
        }

        def command(config: Path | None, **given: Any) -> Result:
            flags = {name: read(fields[name], given.pop(name)) for name in fields}
            return function(load_settings(kind, flags, config), **given)

        own = list(inspect.signature(function).parameters.values())[1:]
        flags = [flag(name, field, (aliases or {}).get(name)) for name, field in fields.items()]
        every = [*flags, parameter("config", Config, None), *own]
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in every}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def flag(name: str, field: FieldInfo, alias: str | None) -> inspect.Parameter:
    dashed = name.replace("_", "-")
    names = [f"--{dashed}/--no-{dashed}"] if value_type(field) is bool else [f"--{dashed}"]
    if alias:
        names.insert(0, alias)
    option = typer.Option(*names, help=help_text(field), metavar=metavar(field), show_default=False)
    return parameter(name, Annotated[click_type(field) | None, option], None)


def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def value_type(field: FieldInfo) -> Any:
    """The field's type, without the None that it may also be."""
    annotation = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
    return annotation


def is_nested(field: FieldInfo) -> bool:
    """Whether it is a list of objects, which a flag is too narrow for."""
    return any(isinstance(part, type) and issubclass(part, BaseModel) for part in get_args(value_type(field)))


def is_secret(field: FieldInfo) -> bool:
    return value_type(field) is SecretStr


def click_type(field: FieldInfo) -> type:
    """What the command line itself checks; all else is the settings' own business."""
    kind = value_type(field)
    return kind if kind in (bool, int, float) and BYTES not in field.metadata else str


def metavar(field: FieldInfo) -> str | None:
    kind = value_type(field)
    if BYTES in field.metadata:
        return "BYTES"
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if kind is Path:
        return "FILE"
    return "NAME,NAME" if get_origin(kind) is tuple else None


def help_text(field: FieldInfo) -> str:
    """The field's description and, where that does not tell it, its default."""
    words = field.description or ""
    if field.default is None or "default" in words.lower():
        return words
    return f"{words} [default: {shown(field.default)}]".strip()


def shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(default) if isinstance(default, tuple) else str(default)


def read(field: FieldInfo, given: Any) -> Any:
    """A flag's value as the settings take it: lists are written with commas."""
    if given is not None and get_origin(value_type(field)) is tuple:
        return tuple(part.strip() for part in str(given).split(",") if part.strip())
    return given
