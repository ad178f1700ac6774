"""What a link's self-test writes, measures and expects."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from prometheus_client import CollectorRegistry
from transfer_rig import SOURCE_LAYOUT, TARGET_LAYOUT, StagedRegion, slices

from baton.clock import ManualClock
from baton.errors import InvalidRequest, UnsupportedModel
from baton.ids import BlockId
from baton.layout import KVLayout
from baton.rpc import transfer_pb2
from baton.rpc.convert import layout_from_proto, layout_to_proto
from kvtransfer.link.conversation import REASON_CHARS_MAX, shortened
from kvtransfer.link.expectation import SLICE_OVERHEAD_S, WRITE_OVERHEAD_S, Expectations, measure_memory
from kvtransfer.link.identity import LinkIdentity, check_hello
from kvtransfer.link.metrics import LinkMetrics, OpenLink
from kvtransfer.link.probe import (
    BULK_BYTES_MAX,
    BULK_S,
    Measured,
    Prober,
    Sample,
    bulk_write_bytes,
    clear_target,
    fill_source,
)
from kvtransfer.region import HostRegion

LARGE = KVLayout(layers=32, blocks=10, block_tokens=32, kv_heads=8, head_dim=128, dtype="bfloat16")


@dataclass
class FakeConnection:
    """A link whose speed is known."""

    clock: ManualClock
    latency_s: float
    bytes_per_s: float
    slice_bytes: int
    transport: str = "fake"
    bytes_written: int = 0
    busy_s: float = 0.0
    unfenced_bytes: int = 0
    writes: list[tuple[int, tuple[BlockId, ...], tuple[BlockId, ...]]] = field(default_factory=list)

    async def write(self, layer: int, source: Sequence[BlockId], target: Sequence[BlockId]) -> None:
        self.writes.append((layer, tuple(source), tuple(target)))
        size_bytes = 2 * len(source) * self.slice_bytes
        self.clock.advance(size_bytes / self.bytes_per_s)
        self.bytes_written += size_bytes
        self.unfenced_bytes += size_bytes

    async def fence(self) -> None:
        self.clock.advance(self.latency_s)
        self.unfenced_bytes = 0

    async def close(self) -> None: ...


def measured(latency_s: float, bytes_per_s: float, layout: KVLayout = LARGE) -> tuple[Measured, FakeConnection]:
    clock = ManualClock()
    connection = FakeConnection(clock, latency_s, bytes_per_s, layout.slice_bytes)
    return asyncio.run(Prober(connection, layout.probe_source, layout, clock).measure()), connection


@pytest.mark.parametrize(("latency_s", "bytes_per_s"), [(1e-5, 2e10), (1e-4, 1e9), (5e-4, 1.2e8)])
def test_latency_and_bandwidth_are_found(latency_s: float, bytes_per_s: float) -> None:
    found, connection = measured(latency_s, bytes_per_s)
    one_layer_s = 2 * LARGE.slice_bytes / bytes_per_s
    assert found.latency_s == pytest.approx(latency_s + one_layer_s)
    assert found.bytes_per_s == pytest.approx(bytes_per_s, rel=0.05)
    assert connection.unfenced_bytes == 0


@pytest.mark.parametrize("bytes_per_s", [1e7, 1e9, 1e12])
def test_it_takes_bounded_time_and_bytes(bytes_per_s: float) -> None:
    _, connection = measured(1e-5, bytes_per_s)
    beside_bulk_bytes = LARGE.block_bytes + 2**20 + bulk_write_bytes(LARGE)
    assert connection.bytes_written <= 2 * BULK_BYTES_MAX + beside_bulk_bytes
    assert connection.clock() <= 3 * BULK_S + beside_bulk_bytes / bytes_per_s


def test_only_the_probe_blocks_are_read_and_written_and_every_layer_is() -> None:
    clock = ManualClock()
    connection = FakeConnection(clock, 1e-5, 1e9, SOURCE_LAYOUT.slice_bytes)
    asyncio.run(Prober(connection, SOURCE_LAYOUT.probe_source, TARGET_LAYOUT, clock).measure())
    layers, sources, targets = zip(*connection.writes, strict=True)
    assert set(layers) == set(range(SOURCE_LAYOUT.layers))
    assert set().union(*sources) == {SOURCE_LAYOUT.probe_source}
    assert set().union(*targets) == {TARGET_LAYOUT.probe_target}


def test_small_blocks_are_written_many_at_a_time() -> None:
    assert bulk_write_bytes(SOURCE_LAYOUT) == 64 * 2 * SOURCE_LAYOUT.slice_bytes
    assert bulk_write_bytes(LARGE) == 2**20


@pytest.mark.parametrize("kind", [HostRegion, StagedRegion])
def test_source_and_target_are_filled_and_nothing_else(kind: type[HostRegion]) -> None:
    region = kind.allocate(SOURCE_LAYOUT)
    slices(region)[:] = 7
    fill_source(region, lambda size: bytes(range(256))[: size % 257] * (size // (size % 257)))
    clear_target(region)
    content = slices(region)
    source, target = SOURCE_LAYOUT.probe_source, SOURCE_LAYOUT.probe_target
    assert (content[:, :, :source] == 7).all() and (content[:, :, target] == 0).all()
    assert not (content[:, :, source] == 7).all()
    region.close()


def test_what_the_sender_tells_makes_the_same_samples() -> None:
    told = Measured.told(0.001, 1e9, LARGE)
    assert (told.latency_s, told.bytes_per_s) == (0.001, pytest.approx(1e9))
    assert [sample.size_bytes for sample in told.samples] == [2 * LARGE.slice_bytes, round(1e9 * BULK_S)]


# ---- what is expected


def of_speed(bytes_per_s: float, latency_s: float = 1e-5) -> Measured:
    return Measured(Sample(1000, latency_s), Sample(round(bytes_per_s), 1.0))


def expected(expectations: Expectations, transport: str, latency_s: float = 1e-5, layout: KVLayout = LARGE) -> float:
    return asyncio.run(expectations.bytes_per_s_min(transport, of_speed(1e9, latency_s), layout))


def test_within_a_machine_a_share_of_its_memory_is_expected_less_what_writes_cost() -> None:
    slow_memory = Expectations(memory=lambda: 1e8)
    assert expected(slow_memory, "shm") == pytest.approx(0.25 * 1e8, rel=0.01)
    assert expected(slow_memory, "nixl") == pytest.approx(0.1 * 1e8, rel=0.01)
    write_s = WRITE_OVERHEAD_S + 2 * 64 * SLICE_OVERHEAD_S
    small = expected(Expectations(memory=lambda: 1e12), "shm", layout=SOURCE_LAYOUT)
    assert small == pytest.approx(bulk_write_bytes(SOURCE_LAYOUT) / write_s, rel=0.01)


def test_networks_are_judged_by_what_the_operator_says_alone() -> None:
    assert expected(Expectations(memory=lambda: 1e10), "tcp") == 0
    assert expected(Expectations(memory=lambda: 1e10), "nixl", latency_s=0.01) == 0
    for transport in ("tcp", "shm", "ucx"):
        assert expected(Expectations(5e9), transport) == 5e9


def test_the_memory_is_measured_once_and_only_when_needed() -> None:
    calls = []
    expectations = Expectations(memory=lambda: calls.append(1) or 1e10)  # type: ignore[func-returns-value]
    expected(expectations, "tcp")
    assert not calls
    for _ in range(2):
        expected(expectations, "shm")
    assert len(calls) == 1


def test_this_machines_memory_can_be_measured() -> None:
    assert 1e8 < measure_memory() < 1e13


# ---- who may link


ME = LinkIdentity("prefill-0", "f", SOURCE_LAYOUT)


def hello(**fields: object) -> transfer_pb2.LinkHello:
    message = transfer_pb2.LinkHello(
        version=1, worker_id="d", nonce=b"n" * 32, fingerprint="f", layout=layout_to_proto(TARGET_LAYOUT)
    )
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def test_a_fitting_receiver_is_welcome_whatever_its_number_of_blocks() -> None:
    assert check_hello(hello(wants_digests=True), ME, makes_digests=True) == TARGET_LAYOUT
    assert check_hello(hello(), ME, makes_digests=False) == TARGET_LAYOUT


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"version": 2}, "version 1"),
        ({"fingerprint": "g"}, "Model, weights or dtype"),
        ({"wants_digests": True}, "makes no digests"),
    ],
)
def test_one_that_does_not_fit_is_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(UnsupportedModel, match=sentence):
        check_hello(hello(**fields), ME, makes_digests=False)


def test_another_layout_is_refused_and_named() -> None:
    other = hello()
    other.layout.block_tokens, other.layout.kv_heads, other.layout.dtype = 8, 3, "float16"
    with pytest.raises(UnsupportedModel, match="differ: kv_heads 2 and 3, dtype float32 and float16; all but"):
        check_hello(other, ME, makes_digests=True)


def test_blocks_of_another_size_are_no_hindrance() -> None:
    other = hello()
    other.layout.block_tokens = 24
    assert check_hello(other, ME, makes_digests=True) == replace(layout_from_proto(hello().layout), block_tokens=24)


@pytest.mark.parametrize(
    "fields", [{"nonce": b"short"}, {"worker_id": ""}, {"worker_id": "x" * 257}, {"worker_id": "a\nb"}]
)
def test_what_no_worker_says_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        check_hello(hello(**fields), ME, makes_digests=True)


@pytest.mark.parametrize("names", [["tcp\x1b"], ["x" * 33], ["tcp"] * 17, [""]])
def test_what_is_no_transports_name_is_refused(names: list[str]) -> None:
    message = hello()
    message.transports.extend(names)
    with pytest.raises(InvalidRequest):
        check_hello(message, ME, makes_digests=True)


def test_a_reason_that_travels_is_one_short_line() -> None:
    assert shortened("no\n such \x1b[31mdevice") == "no such ?[31mdevice"
    assert len(shortened("x" * 10_000)) == REASON_CHARS_MAX


@pytest.mark.parametrize("change", [{"dtype": "float7"}, {"layers": 0}, {"blocks": 2**32 - 1, "head_dim": 2**32 - 1}])
def test_what_no_region_can_be_is_refused(change: dict[str, object]) -> None:
    message = hello()
    for name, value in change.items():
        setattr(message.layout, name, value)
    with pytest.raises(InvalidRequest):
        check_hello(message, ME, makes_digests=True)


# ---- what is shown


def test_a_links_series_go_with_it_and_two_ways_share_them() -> None:
    registry = CollectorRegistry()
    metrics = LinkMetrics(registry)
    there, back = (OpenLink("shm", "w", latency_s, 1e9, is_slow=False) for latency_s in (0.1, 0.2))
    labels = {"transport": "shm", "peer": "w"}

    def latency_s() -> float | None:
        return registry.get_sample_value("baton_kv_link_latency_seconds", labels)

    metrics.opened(there)
    metrics.opened(back)
    assert registry.get_sample_value("baton_kv_links", {"transport": "shm", "speed": "expected"}) == 2
    assert latency_s() == 0.2
    metrics.closed(back)
    assert latency_s() == 0.1
    metrics.closed(there)
    assert latency_s() is None
    assert registry.get_sample_value("baton_kv_link_bytes_per_second", labels) is None
    assert registry.get_sample_value("baton_kv_links", {"transport": "shm", "speed": "expected"}) == 0
