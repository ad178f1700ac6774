"""Who may use this cluster, and on what terms: the tenants' file.

API keys are known here by their SHA-256 alone. That needs keys too long to guess, so those that are read from files
must have KEY_CHARACTERS_MIN characters; docs/tenants.md says how to make one.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from baton.errors import InvalidRequest, SettingsError, Unauthorized
from baton.settings import Bytes
from router.admission.request_class import CLASSES, RequestClass

KEY_CHARACTERS_MIN, KEY_CHARACTERS_MAX = 20, 512
FILE_BYTES_MAX = 16 * 2**20
TOKENS_MAX = 10**9
"""A minute, or at once."""
_KEY = re.compile(rf"[!-~]{{{KEY_CHARACTERS_MIN},{KEY_CHARACTERS_MAX}}}")
_TELLABLE = re.compile(r"[a-z_0-9]{1,32}")
_HOW_TO_AUTHENTICATE = "send one of yours in the header `Authorization: Bearer KEY`."
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")]
Tokens = Annotated[int, Field(ge=0, le=TOKENS_MAX)]


class Tenant(BaseModel):
    """One tenant's terms; where a limit may be 0, that stands for no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Name
    """Also a label in metrics."""
    api_keys_sha256: tuple[Sha256, ...] = Field(default=(), repr=False)
    """In hex; several, so that one can be replaced without a gap."""
    api_key_files: tuple[Path, ...] = ()
    """Each holds one key."""
    weight: float = Field(default=1.0, ge=0.001, le=1000.0)
    """Its share of what is given out while others wait, beside theirs."""
    tokens_per_minute: Tokens = 0
    burst_tokens: Tokens = 0
    """That may be used at once after a rest; 0: a minute's worth."""
    requests_max: int = Field(default=0, ge=0)
    """Waiting or running, on all routers together."""
    classes: tuple[RequestClass, ...] = Field(default=CLASSES, min_length=1)
    default_class: RequestClass | None = None
    """Of requests that name none; unset: standard if allowed, else the first of `classes`."""
    models: tuple[str, ...] = ()
    """By the names that workers serve them by; none: all."""
    context_length_max: int = Field(default=0, ge=0)
    """Prompt and completion together, in tokens."""
    model_context_length_max: Mapping[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """The same for single models, in place of `context_length_max`."""
    cache: Literal["own", "shared"] = "own"
    """Whether cached prefixes are shared with the other tenants that say `shared`. How fast an answer comes tells
    whether its prompt was cached, so `shared` lets those tenants find out what others have sent."""
    cache_bytes_max: Bytes = Field(default=0, ge=0)
    """What its requests may have kept by `cache` on each worker; here 0 stands for nothing."""
    operator: bool = False
    """Whether its keys also open what concerns everybody: the whole cache's state, and clearing it."""

    @model_validator(mode="after")
    def default_class_is_allowed(self) -> Self:
        if self.default_class is not None and self.default_class not in self.classes:
            raise ValueError(f"default_class {self.default_class!r} is none of the tenant's classes")
        return self

    @property
    def burst(self) -> int:
        """Of a tenant with a rate, in tokens."""
        return self.burst_tokens or self.tokens_per_minute

    def class_of(self, asked: RequestClass | None) -> RequestClass:
        """The request's. Raises InvalidRequest if the tenant may not use it."""
        if asked is not None and asked not in self.classes:
            raise InvalidRequest(
                f"Requests of class {asked!r} are not open to this API key; it may use: {', '.join(self.classes)}."
            )
        return asked or self.default_class or ("standard" if "standard" in self.classes else self.classes[0])

    def context_length_of(self, model: str) -> int:
        """The tenant's limit; 0: none."""
        return self.model_context_length_max.get(model, self.context_length_max)

    def cache_salt(self, asked: str) -> str:
        """What keeps cached prefixes apart: no two tenants have a salt in common, unless both share. The salt that a
        request asks for parts the tenant's own prefixes further."""
        if self.cache == "own":
            return f"\0{self.name}\0{asked}"
        return f"\0\0{asked}" if asked.startswith("\0") else asked


OPEN = Tenant(name="default", cache="shared", operator=True)
"""Everybody, where no tenants are named."""


class Tenants:
    """Lives on one thread; `replace` changes who is known, for requests from then on."""

    def __init__(self, by_key: Mapping[bytes, Tenant], all_tenants: Iterable[Tenant], *, is_open: bool) -> None:
        self._by_key = by_key
        self._by_name = {tenant.name: tenant for tenant in all_tenants}
        self.is_open = is_open
        """Whether anybody may come, and needs no key."""

    @classmethod
    def open(cls) -> "Tenants":
        """Everybody is the tenant `default`, without limits."""
        return cls({}, [OPEN], is_open=True)

    @classmethod
    def load(cls, path: Path) -> "Tenants":
        """Raises SettingsError with a sentence that holds no key, if the file or one that it names cannot be used."""
        tenants = read_tenants(path)
        by_key: dict[bytes, Tenant] = {}
        for tenant in tenants:
            for digest in {*map(bytes.fromhex, tenant.api_keys_sha256), *map(_digest_in, tenant.api_key_files)}:
                if (other := by_key.get(digest)) is not None:
                    raise SettingsError(
                        f"{path}: the tenants {other.name} and {tenant.name} have an API key in common."
                    )
                by_key[digest] = tenant
        return cls(by_key, tenants, is_open=False)

    @property
    def by_name(self) -> Mapping[str, Tenant]:
        return self._by_name

    def replace(self, other: "Tenants") -> None:
        """From now on these are known. What is under way goes on, on the terms that it came by."""
        self._by_key, self._by_name, self.is_open = other._by_key, other._by_name, other.is_open

    def authenticate(self, authorization: str | None) -> Tenant:
        """Whose request this is, by its Authorization header; ignored where everybody may come.

        Raises Unauthorized. The search is by the digest of what was sent, so how long it takes says nothing of a key.
        """
        if self.is_open:
            return OPEN
        if not authorization:
            raise Unauthorized(f"This server wants an API key: {_HOW_TO_AUTHENTICATE}")
        scheme, _, key = authorization.partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key or len(key) > KEY_CHARACTERS_MAX:
            raise Unauthorized(f"The Authorization header holds no API key: {_HOW_TO_AUTHENTICATE}")
        tenant = self._by_key.get(_digest(key))
        if tenant is None:
            raise Unauthorized(f"This API key is not known here; {_HOW_TO_AUTHENTICATE}")
        return tenant


class TenantsFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    tenants: tuple[Tenant, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def tenants_are_told_apart(self) -> Self:
        seen: set[str] = set()
        for tenant in self.tenants:
            if tenant.name in seen:
                raise ValueError(f"the name {tenant.name} is given twice")
            if not tenant.api_keys_sha256 and not tenant.api_key_files:
                raise ValueError(f"{tenant.name} has no API key: give api_keys_sha256 or api_key_files")
            seen.add(tenant.name)
        return self


def read_tenants(path: Path) -> tuple[Tenant, ...]:
    """What the file says. Raises SettingsError."""
    try:
        file = TenantsFile.model_validate(_read_yaml(path))
    except ValidationError as error:
        problems = "; ".join(
            f"{_place(one['loc']) or 'the file'}: {one['msg'].removeprefix('Value error, ')}"
            for one in error.errors(include_input=False, include_url=False, include_context=False)
        )
        raise SettingsError(f"The tenants file {path} cannot be used: {problems}.") from None
    beside = path.parent
    return tuple(
        tenant.model_copy(update={"api_key_files": tuple(beside / key for key in tenant.api_key_files)})
        for tenant in file.tenants
    )


def _read_yaml(path: Path) -> Any:
    text = _read(path, FILE_BYTES_MAX)
    try:
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the same, the one in C if there
    except yaml.YAMLError as error:  # its own message quotes the line, and with it perhaps a key
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise SettingsError(f"The tenants file {path} is not YAML{where}.") from None


def _place(path: tuple[int | str, ...]) -> str:
    """Where in the file. A name that could be a key put in the wrong place is not told."""
    return ".".join(str(part) if _TELLABLE.fullmatch(str(part)) else "..." for part in path)


def _digest_in(path: Path) -> bytes:
    key = _read(path, KEY_CHARACTERS_MAX + 2).strip()
    if not _KEY.fullmatch(key):
        raise SettingsError(
            f"The API key in {path} cannot be used: it must have {KEY_CHARACTERS_MIN} to {KEY_CHARACTERS_MAX} "
            "characters, ASCII and no spaces."
        )
    return _digest(key)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(path: Path, size_max: int) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(size_max + 1)
        if len(data) > size_max:
            raise SettingsError(f"{path} is larger than {size_max} bytes.")
        return data.decode()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text.") from None
