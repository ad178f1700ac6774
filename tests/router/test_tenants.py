import asyncio
import hashlib
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidRequest, SettingsError, Unauthorized
from router.admission.tenants import OPEN, Tenant, Tenants
from router.admission.tenants_reload import TenantsReload

KEY, OTHER_KEY = "sk-0123456789abcdef0123", "sk-fedcba9876543210fedc"
ASCII = st.text(st.characters(min_codepoint=0, max_codepoint=127), max_size=30)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def write(directory: Path, text: str) -> Path:
    path = directory / "tenants.yaml"
    path.write_text(text)
    return path


def load(directory: Path, text: str) -> Tenants:
    return Tenants.load(write(directory, text))


def one_tenant(name: str = "acme", key: str = KEY, more: str = "") -> str:
    return f"tenants:\n- name: {name}\n  api_keys_sha256: ['{digest(key)}']\n{more}"


# ---- who it is


def test_a_key_tells_the_tenant(tmp_path: Path) -> None:
    (tmp_path / "beta.key").write_text(f"{OTHER_KEY}\n")
    tenants = load(tmp_path, one_tenant() + "- name: beta\n  api_key_files: [beta.key]\n  weight: 2\n")
    assert tenants.authenticate(f"Bearer {KEY}").name == "acme"
    assert tenants.authenticate(f"bearer  {OTHER_KEY} ").name == "beta"
    assert set(tenants.by_name) == {"acme", "beta"}
    assert not tenants.is_open


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY.upper()}",
        f"Bearer {digest(KEY)}",
    ],
)
def test_without_a_known_key_nobody_gets_in_and_no_key_is_told(tmp_path: Path, header: str | None) -> None:
    with pytest.raises(Unauthorized, match="Authorization: Bearer KEY") as caught:
        load(tmp_path, one_tenant()).authenticate(header)
    assert KEY[3:12] not in str(caught.value)


@given(st.text(max_size=40))
def test_any_header_is_an_answer_and_no_crash(header: str) -> None:
    tenants = Tenants({bytes.fromhex(digest(KEY)): Tenant(name="a")}, [Tenant(name="a")], is_open=False)
    with pytest.raises(Unauthorized):
        tenants.authenticate(header)
    with pytest.raises(Unauthorized):
        tenants.authenticate(f"Bearer {header}")


def test_without_a_file_everybody_is_one_tenant_whatever_the_header_says() -> None:
    for header in (None, "Bearer whatever", "junk"):
        assert Tenants.open().authenticate(header) is OPEN
    assert OPEN.cache_salt("mine") == "mine"


# ---- on what terms


def test_the_class_is_what_was_asked_for_if_allowed_else_the_tenants_own() -> None:
    assert Tenant(name="a").class_of(None) == "standard"
    assert Tenant(name="a").class_of("batch") == "batch"
    assert Tenant(name="a", classes=("batch",)).class_of(None) == "batch"
    assert Tenant(name="a", default_class="interactive").class_of(None) == "interactive"
    with pytest.raises(InvalidRequest, match=r"'interactive'.*batch"):
        Tenant(name="a", classes=("batch",)).class_of("interactive")


def test_a_models_own_context_goes_before_the_tenants() -> None:
    tenant = Tenant(name="a", context_length_max=100, model_context_length_max={"n": 500})
    assert [tenant.context_length_of(model) for model in "mn"] == [100, 500]


SALTS = st.one_of(ASCII, st.sampled_from(["", "\0", "\0\0", "\0a\0", "a\0", "\0\0\0a\0"]))
TENANTS = (Tenant(name="a"), Tenant(name="b"), Tenant(name="a.b"), Tenant(name="s", cache="shared"))


@given(st.sampled_from(TENANTS), SALTS, st.sampled_from(TENANTS), SALTS)
def test_only_the_same_salt_of_the_same_tenant_shares_a_cache(a: Tenant, one: str, b: Tenant, other: str) -> None:
    assert (a.cache_salt(one) == b.cache_salt(other)) == (a.name == b.name and one == other)


def test_sharing_tenants_share() -> None:
    tenants = [Tenant(name=name, cache="shared") for name in "ab"]
    assert len({tenant.cache_salt("x") for tenant in tenants}) == 1


# ---- files that cannot be used


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tenants: [", "not YAML at line"),
        ("", "the file"),
        ("tenants: []", "at least 1"),
        ("tenants:\n- name: a\n", "a has no API key"),
        (one_tenant(more=f"- name: acme\n  api_keys_sha256: ['{digest(OTHER_KEY)}']\n"), "acme is given twice"),
        (one_tenant(more=f"- name: beta\n  api_keys_sha256: ['{digest(KEY)}']\n"), "have an API key in common"),
        (f"tenants:\n- name: a\n  api_keys_sha256: ['{KEY}']\n", "api_keys_sha256.0: String should match"),
        (f"tenants:\n- name: a\n  api_key: {KEY}\n", "api_key: Extra inputs"),
        (f"tenants:\n- name: a\n  {KEY}: a\n", r"tenants\.0\.\.\.\.: Extra inputs"),
        (one_tenant("no spaces"), "tenants.0.name"),
        (one_tenant(more="  weight: 0\n"), "tenants.0.weight"),
        (one_tenant(more="  tokens_per_minute: -1\n"), "tenants.0.tokens_per_minute"),
        (one_tenant(more="  classes: [urgent]\n"), "tenants.0.classes.0"),
        (one_tenant(more="  classes: [batch]\n  default_class: standard\n"), "none of the tenant's classes"),
        (one_tenant(more="  model_context_length_max: {m: 0}\n"), "greater than or equal to 1"),
        ("tenants:\n- name: a\n  api_key_files: [missing.key]\n", "missing.key cannot be read"),
        ("tenants:\n- name: a\n  api_key_files: [short.key]\n", "at least|20 to 512"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_a_sentence_without_keys(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "short.key").write_text("hunter2-hunter2")
    with pytest.raises(SettingsError, match=says) as caught:
        load(tmp_path, text)
    for secret in (KEY, digest(KEY), "hunter2"):
        assert secret not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        Tenants.load(tmp_path / "none.yaml")


def test_no_key_shows_in_a_tenants_repr(tmp_path: Path) -> None:
    tenant = load(tmp_path, one_tenant()).authenticate(f"Bearer {KEY}")
    assert digest(KEY) not in repr(tenant)


# ---- read again


def test_a_changed_file_is_read_again_and_a_bad_one_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        tenants, told = load(tmp_path, one_tenant()), list[bool]()
        reload = TenantsReload(tmp_path / "tenants.yaml", tenants, told.append)
        await reload.look()
        write(tmp_path, one_tenant("renamed"))
        await reload.look()
        assert tenants.authenticate(f"Bearer {KEY}").name == "renamed"
        write(tmp_path, "tenants: [")
        await reload.look()
        await reload.look()
        assert tenants.authenticate(f"Bearer {KEY}").name == "renamed"
        assert told == [False, False, True]
        write(tmp_path, one_tenant("again", OTHER_KEY))
        await reload.look()
        assert tenants.authenticate(f"Bearer {OTHER_KEY}").name == "again"
        with pytest.raises(Unauthorized):
            tenants.authenticate(f"Bearer {KEY}")
        assert told[-1] is False

    with caplog.at_level(logging.INFO):
        asyncio.run(test())
    assert sum("What it said before goes on" in line for line in caplog.messages) == 1
    assert KEY not in caplog.text
    assert digest(KEY) not in caplog.text


def test_a_changed_key_file_is_read_again_by_itself(tmp_path: Path) -> None:
    async def test() -> None:
        key = tmp_path / "a.key"
        key.write_text(KEY)
        tenants = load(tmp_path, "tenants:\n- name: a\n  api_key_files: [a.key]\n")
        read, told = asyncio.Event(), list[bool]()

        def tell(is_unusable: bool) -> None:
            told.append(is_unusable)
            read.set()

        reload = TenantsReload(tmp_path / "tenants.yaml", tenants, tell, period_s=0.005)
        reload.start()
        async with asyncio.timeout(30):
            await read.wait()
            read.clear()
            (tmp_path / "new.key").write_text(OTHER_KEY)
            os.replace(tmp_path / "new.key", key)  # as a mounted secret changes: at once
            await read.wait()
        assert tenants.authenticate(f"Bearer {OTHER_KEY}").name == "a"
        await reload.close()
        await reload.close()

    asyncio.run(test())
