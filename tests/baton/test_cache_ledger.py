from hashlib import sha256

import hypothesis.strategies as st
import pytest
from hypothesis import given

from baton.cluster.cache_events import (
    NAME_BYTES,
    SNAPSHOT_MESSAGE_BLOCKS,
    CacheChanges,
    CacheEvents,
    CacheInventory,
    MalformedEvents,
    from_sets,
    stream_key,
    unpack,
)
from baton.cluster.cache_ledger import BATCH_BLOCKS_MAX, PENDING_BLOCKS_MAX, CacheLedger
from baton.ids import BlockHash, WorkerId
from baton.latency import TIERS, Tier
from baton.rpc import events_pb2


def names(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(sha256(str(number).encode()).digest()[:NAME_BYTES]) for number in numbers)


def held(inventory: CacheInventory) -> dict[BlockHash, Tier]:
    return {name: tier for tier, packed in inventory.blocks.items() for name in unpack(packed)}


def replay(state: dict[BlockHash, Tier], events: CacheEvents) -> None:
    for changed in (events.stored, events.moved):
        for tier, packed in changed.items():
            state |= dict.fromkeys(unpack(packed), tier)
    for name in unpack(events.removed):
        state.pop(name, None)


# ---- the wire


def test_events_survive_the_wire() -> None:
    events = CacheEvents.of(
        "e1", 7, CacheChanges({"hbm": names(1, 2), "ddr": names(3)}, {"ssd": names(4)}, names(5, 6))
    )
    assert CacheEvents.from_bytes(events.to_bytes()) == events and events.blocks == 6


@pytest.mark.parametrize("data", [b"junk", events_pb2.CacheEvents(epoch="1", removed=b"short").SerializeToString()])
def test_what_is_no_batch_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedEvents):
        CacheEvents.from_bytes(data)


def test_a_tier_of_some_later_version_is_left_out() -> None:
    data = events_pb2.CacheEvents(epoch="1", stored=[events_pb2.BlockSet(tier=9, block_hashes=b"x" * 16)])
    assert CacheEvents.from_bytes(data.SerializeToString()).stored == {}


def test_keys_lie_in_one_slot_with_the_memberships() -> None:
    assert stream_key("p", WorkerId("w")) == "{p}:cache-events:w"


def test_an_inventory_travels_in_messages_of_bounded_size() -> None:
    many = b"".join(number.to_bytes(NAME_BYTES, "big") for number in range(2 * SNAPSHOT_MESSAGE_BLOCKS + 1))
    messages = list(CacheInventory("e", 5, {"hbm": many, "ssd": many[:NAME_BYTES]}).messages())
    assert len(messages) == 4 and {(message.epoch, message.sequence) for message in messages} == {("e", 5)}
    assert max(message.ByteSize() for message in messages) < SNAPSHOT_MESSAGE_BLOCKS * NAME_BYTES + 100
    assert b"".join(from_sets(message.blocks).get("hbm", b"") for message in messages) == many
    assert [message.sequence for message in CacheInventory("e", 0, {}).messages()] == [0]


# ---- the ledger


def test_what_waits_goes_as_one_batch_and_only_the_last_word_counts() -> None:
    ledger = CacheLedger("e")
    ledger.record(CacheChanges({"hbm": names(1, 2, 3)}))
    ledger.record(CacheChanges(moved={"ddr": names(2)}, removed=names(3)))
    assert ledger.sequence == 0 and ledger.has_news
    events = ledger.take()
    assert events == CacheEvents.of("e", 1, CacheChanges({"hbm": names(1)}, {"ddr": names(2)}, names(3)))
    assert not ledger.has_news and ledger.sequence == 1
    ledger.record(CacheChanges({"ssd": names(3)}, removed=names(1)))
    assert ledger.take() == CacheEvents.of("e", 2, CacheChanges({"ssd": names(3)}, removed=names(1)))
    assert held(ledger.inventory()) == dict(zip(names(2, 3), ("ddr", "ssd"), strict=True))


def test_a_large_change_goes_as_several_batches() -> None:
    ledger = CacheLedger("e")
    ledger.record(CacheChanges({"hbm": names(*range(2 * BATCH_BLOCKS_MAX + 1))}))
    sizes = []
    while ledger.has_news:
        sizes.append(ledger.take().blocks)
    assert sizes == [BATCH_BLOCKS_MAX, BATCH_BLOCKS_MAX, 1] and ledger.sequence == 3


def test_what_nobody_can_be_told_is_dropped_and_a_number_skipped() -> None:
    ledger = CacheLedger("e")
    ledger.record(CacheChanges({"hbm": names(*range(PENDING_BLOCKS_MAX))}))
    assert ledger.has_news and ledger.dropped == 0
    ledger.record(CacheChanges({"hbm": names(-1)}))
    assert not ledger.has_news and (ledger.dropped, ledger.sequence) == (1, 1)
    ledger.record(CacheChanges({"hbm": names(-2)}))
    assert ledger.take().sequence == 2
    inventory = ledger.inventory()
    assert inventory.sequence == 2 and len(held(inventory)) == PENDING_BLOCKS_MAX + 2


some = st.lists(st.sampled_from(names(*range(8))), max_size=5).map(tuple)
by_tier = st.dictionaries(st.sampled_from(TIERS), some, max_size=2)
steps = st.lists(st.one_of(st.builds(CacheChanges, by_tier, by_tier, some), st.just("take")), max_size=30)


@given(steps=steps, at=st.integers(0, 30))
def test_a_snapshot_at_any_moment_and_the_batches_after_it_give_what_is_there(
    steps: list[CacheChanges | str], at: int
) -> None:
    ledger, truth, batches = CacheLedger("e"), dict[BlockHash, Tier](), list[CacheEvents]()
    inventory = ledger.inventory()
    for number, step in enumerate(steps):
        if isinstance(step, CacheChanges):
            ledger.record(step)
            replay(truth, CacheEvents.of("e", 0, step))
        elif ledger.has_news:
            batches.append(ledger.take())
        if number == at:
            inventory = ledger.inventory()
            assert held(inventory) == truth
    if ledger.has_news:
        batches.append(ledger.take())
    assert [batch.sequence for batch in batches] == list(range(1, len(batches) + 1))
    state = held(inventory)
    for batch in batches:
        if batch.sequence > inventory.sequence:
            replay(state, batch)
    assert state == truth == held(ledger.inventory())
