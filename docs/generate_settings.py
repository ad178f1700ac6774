"""Writes docs/settings.md from baton/settings.py: `python docs/generate_settings.py`."""

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from baton.settings import (
    BYTES,
    DecodeWorkerSettings,
    ModelSettings,
    PrefillWorkerSettings,
    RouterSettings,
    ServiceSettings,
    UpSettings,
    UpstreamSettings,
    WorkerSettings,
)
from launcher.plan import BY_HAND_ONLY

PAGE = Path(__file__).parent / "settings.md"
INTRODUCTION = """\
# Settings

<!-- Made by docs/generate_settings.py from baton/settings.py; do not edit. -->

A setting has one name everywhere: the flag `--kv-blocks`, the environment variable `BATON_KV_BLOCKS` and the YAML
key `kv_blocks` (in the file given with `--config`) are the same. A flag wins over the environment, the environment
over the file, the file over the default. All are read once, at the start; a bad value or an unknown key in the file
ends the start with a sentence that names it. Switches have a negative form: `--no-prefix-cache`.
Lists are separated by commas in flags, and are JSON in environment variables. A size is a number of
bytes, or one with a unit: `500MB`, `4GiB`.
"""
NESTED = {ModelSettings: "[models](#a-model)", UpstreamSettings: "[upstream](#an-upstream)"}
NOT_FOR_UP = ", ".join(f"`{name}`" for name in sorted(BY_HAND_ONLY))
MODELS = """\
An entry of the router's `models`. They have no flags: they stand in the YAML file, or in `BATON_MODELS` as JSON. Each
has its own workers, which announce it by its `name` (their `served_model_name`).

```yaml
models:
  - name: llama-8b
    model: /models/llama-8b
    aliases: [default]
  - name: llama-70b
    model: /models/llama-70b
    context_length_max: 32768
    upstream: {url: "https://llm.example.com/v1", api_key_file: /secrets/llm, use: overflow}
```"""
UPSTREAM = """\
Under a model's `upstream`: an OpenAI-compatible endpoint that takes completions and chat completions which the cluster
cannot. [HTTP API](http-api.md#upstream) says what is sent there."""
SECTIONS: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("Every process", ServiceSettings, "Taken by every command that serves."),
    ("Workers", WorkerSettings, "Also taken by `baton prefill-worker`, `baton decode-worker` and `baton up`."),
    ("Prefill worker", PrefillWorkerSettings, "Also taken by `baton prefill-worker` and `baton up`."),
    ("Decode worker", DecodeWorkerSettings, "Also taken by `baton decode-worker` and `baton up`."),
    ("Router", RouterSettings, "Also taken by `baton router` and `baton up`."),
    ("A model", ModelSettings, MODELS),
    ("An upstream", UpstreamSettings, UPSTREAM),
    ("One command", UpSettings, f"`baton up` takes these, and all of the above but {NOT_FOR_UP}."),
)


def render() -> str:
    return "\n".join([INTRODUCTION, *(section(*one) for one in SECTIONS)])


def section(title: str, settings: type[BaseModel], who: str) -> str:
    rows = [
        row(name, settings.model_fields[name]) for name in settings.__annotations__ if name in settings.model_fields
    ]
    head = ["| setting | value | default | what it is |", "|---|---|---|---|"]
    return "\n".join([f"## {title}", "", who, "", *head, *rows, ""])


def row(name: str, field: FieldInfo) -> str:
    shown = "required" if field.is_required() else default(field.default)
    return f"| `{name}` | {value(field)} | {shown} | {field.description or ''} |"


def value(field: FieldInfo) -> str:
    """The type, and the range where one is set."""
    limits = [
        f"{sign} {getattr(limit, bound)}"
        for limit in field.metadata
        for bound, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"))
        if hasattr(limit, bound)
    ]
    return ", ".join(["size" if BYTES in field.metadata else kind(field.annotation), *limits])


def kind(annotation: Any) -> str:
    arguments = [part for part in get_args(annotation) if part not in (NoneType, Ellipsis)]
    if get_origin(annotation) in (Union, UnionType):
        return kind(arguments[0])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if get_origin(annotation) is tuple:
        return f"list of {kind(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return NESTED[annotation]
    return {str: "text", int: "integer", float: "number", bool: "switch", Path: "file", SecretStr: "secret"}[annotation]


def default(given: Any) -> str:
    if given is None or given == ():
        return "–"
    if isinstance(given, bool):
        return "on" if given else "off"
    return f"`{','.join(given) if isinstance(given, tuple) else given}`"


if __name__ == "__main__":
    PAGE.write_text(render())
