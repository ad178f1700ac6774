"""The prefix index's memory: which block is where, in 60 to 110 bytes a block however many workers hold it.

A block is known by 60 bits of its name and by the dictionary it is in, which the name's first byte says. What is known
of it is one integer: a hex digit for each *column*, which is one life of one worker's cache. Digits: 1 HBM, 2 DDR,
4 SSD, 8 expected there soon, 0 not there. Blocks with equal digits share one integer object, so a prefix that went the
same way is walked by comparing identities.

Two names that agree in that cost a wrong prediction, never a wrong token: workers look up the full name.

The dictionaries are many and small, because one that grows stops everything: measured at 4 million blocks, 460 ms for
a single one, 10 to 20 ms at most where there are 256.
"""

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.cluster.cache_events import NAME_BYTES
from baton.latency import TIERS, Tier

SHARDS = 256
"""A name's first byte says which."""
INTERNED_MAX = 65_536
"""States shared between blocks; past it sharing starts anew, which costs memory and nothing else."""
_PRIME = np.uint64(2**60 - 93)
_HEX_DIGIT = 4


class PrefixLength(NamedTuple):
    """Blocks of the longest prefix that one worker holds, by the tier they lie in."""

    hbm: int = 0
    """Here or expected here."""
    ddr: int = 0
    ssd: int = 0

    @property
    def total(self) -> int:
        return self.hbm + self.ddr + self.ssd


class Keys(NamedTuple):
    """What blocks are known by here, and which dictionary each is in."""

    keys: list[int]
    shards: bytes


def keys_of(names: bytes) -> Keys:
    """Of packed names."""
    words = np.frombuffer(names, np.uint64)
    keys: list[int] = ((words[::2] ^ words[1::2]) % _PRIME).tolist()
    return Keys(keys, names[::NAME_BYTES])


class Column:
    """One life of one worker's cache: a hex digit's place in every block's state."""

    __slots__ = ("expected", "number", "one", "tier_bits", "tiers")

    def __init__(self, number: int) -> None:
        self.number = number
        self.one = 1 << _HEX_DIGIT * number
        """The digit's lowest bit."""
        self.tiers: dict[Tier, int] = {tier: self.one << bit for bit, tier in enumerate(TIERS)}
        """The state of a block that is in this tier here, and nowhere else."""
        self.tier_bits = self.one * 7
        self.expected = self.one << 3


class BlockTable:
    """Pure and single-threaded. Past `blocks_max` nothing new is learned: what is known then are rather the heads of
    prefixes than their tails, and a tail without its head would be of no use."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._shards: list[dict[int, int]] = [{} for _ in range(SHARDS)]
        self._shard = self._shards.__getitem__
        self._length_bound = 0
        """At least the number of blocks; made exact only when it reaches the bound."""
        self._interned: dict[int, int] = {}
        self._columns = 0
        """Ever in use at the same time."""
        self._free: list[int] = []
        self._used = 0
        """The lowest bit of each column that is open."""
        self._leaving = 0
        """Of each that was closed and is still to be swept."""
        self._sweeping = 0
        self._unswept: Iterator[int] = iter(())

    def __len__(self) -> int:
        """Blocks known, those included that only closed columns held and that are still to be swept."""
        return sum(map(len, self._shards))

    @property
    def size_bytes(self) -> int:
        """Of the dictionaries, their keys and the states, as CPython allocates them."""
        states = sum(state.__sizeof__() for state in self._interned)
        tables = sum(shard.__sizeof__() for shard in self._shards) + self._interned.__sizeof__()
        return tables + 32 * len(self) + states

    # ---- columns

    def open_column(self) -> Column:
        """An empty one."""
        if self._free:
            number = self._free.pop(self._free.index(min(self._free)))  # low numbers keep states short
        else:
            number, self._columns = self._columns, self._columns + 1
        column = Column(number)
        self._used |= column.one
        return column

    def close_column(self, column: Column) -> None:
        """At once nobody finds anything in it; its number is used again when `sweep` has been everywhere."""
        self._used &= ~column.one
        self._leaving |= column.one

    def sweep(self) -> bool:
        """Clears closed columns out of one shard: 1/256 of all blocks, about 0.1 µs each. True while there is more."""
        shard = next(self._unswept, None)
        if shard is not None:
            swept = _Swept(~(self._sweeping * 0xF), self._interned)
            blocks = self._shards[shard]
            self._shards[shard] = {key: rest for key, state in blocks.items() if (rest := swept[state])}
            return True
        self._free += columns_in(self._sweeping)
        self._sweeping, self._leaving = self._leaving, 0
        if self._sweeping:
            self._interned.clear()  # so that no state of a closed column is kept alive
            self._unswept = iter(range(SHARDS))
        return bool(self._sweeping)

    # ---- changes

    def store(self, column: Column, tier: Tier, names: bytes) -> int:
        """These blocks are in this tier of this column now. Returns how many were not learned for want of room."""
        known, refused = self._within_bound(keys_of(names))
        keys, shards = known
        state = column.tiers[tier]
        before = list(map(dict.setdefault, map(self._shard, shards), keys, repeat(state)))
        if before.count(state) < len(before):
            self._rewrite(known, before, ~(column.one * 0xF), state)
        return refused

    def remove(self, column: Column, names: bytes) -> None:
        """These blocks are in no tier of this column any more; those expected there still are."""
        keys, shards = known = keys_of(names)
        before = list(map(dict.pop, map(self._shard, shards), keys, repeat(0)))
        if before.count(column.tiers["hbm"]) < len(before):  # else nobody else had any of them
            self._rewrite(known, before, ~column.tier_bits, 0, were_popped=True)

    def expect(self, columns: Iterable[Column], known: Keys) -> None:
        """Where nothing is known of these blocks, they are expected."""
        (keys, shards), _ = self._within_bound(known)
        columns = tuple(columns)
        last: int | None = -1
        after = 0
        for key, shard in zip(keys, map(self._shard, shards), strict=True):
            state = shard.get(key)
            if state is not last:
                last, after = state, self._intern(_with_expected(state or 0, columns))
            if after is not state:
                shard[key] = after

    def unexpect(self, column: Column, known: Keys) -> None:
        """Forgets what is still only expected there."""
        before = list(map(dict.get, map(self._shard, known.shards), known.keys, repeat(0)))
        self._rewrite(known, before, ~column.expected, 0)

    def _rewrite(self, known: Keys, before: list[int], keep: int, add: int, *, were_popped: bool = False) -> None:
        """Each state becomes `state & keep | add`; a block of which nothing is left is forgotten."""
        last, after = -1, 0
        for key, shard, state in zip(known.keys, map(self._shard, known.shards), before, strict=True):
            if state is not last:
                last, after = state, state & keep | add
                after = self._intern(after) if after else 0
            if not after:
                if state:  # else it was not known, or is named twice and dealt with
                    shard.pop(key, None)
            elif were_popped or after is not state:
                shard[key] = after

    def _within_bound(self, known: Keys) -> tuple[Keys, int]:
        """As many of these as there is room for, and how many there is none for."""
        self._length_bound += len(known.keys)
        if self._length_bound <= self._blocks_max:
            return known, 0
        length = len(self)
        self._length_bound = length + len(known.keys)
        room = self._blocks_max - length
        if len(known.keys) <= room:
            return known, 0
        return self._first_that_fit(known, room)

    def _first_that_fit(self, known: Keys, room: int) -> tuple[Keys, int]:
        fits = []
        for index, (key, shard) in enumerate(zip(known.keys, map(self._shard, known.shards), strict=True)):
            if key in shard:
                fits.append(index)
            elif room:
                fits.append(index)
                room -= 1
        kept = Keys([known.keys[index] for index in fits], bytes(known.shards[index] for index in fits))
        return kept, len(known.keys) - len(fits)

    def _intern(self, state: int) -> int:
        if len(self._interned) >= INTERNED_MAX:
            self._interned.clear()
        return self._interned.setdefault(state, state)

    # ---- looking up

    def match(self, known: Keys, columns: int) -> list[tuple[int, PrefixLength]]:
        """The longest prefix that each of these columns holds, given by their lowest bits; those that hold the same
        are told together, those that hold nothing left out."""
        walk = _Walk(columns)
        last: int | None = -1
        for position, state in enumerate(map(dict.get, map(self._shard, known.shards), known.keys)):
            if state is not last:
                if not walk.turn(position, state or 0):
                    return walk.found
                last = state
        walk.turn(len(known.keys), 0)
        return walk.found

    # ---- self-check

    def states(self) -> list[int]:
        """O(blocks): what is known of every block, without what is still to be swept."""
        used = self._used * 0xF
        return [state & used for shard in self._shards for state in shard.values() if state & used]

    def check_integrity(self) -> None:
        """O(blocks)."""
        assert len(self) <= min(self._length_bound, self._blocks_max)
        assert not self._used & (self._leaving | self._sweeping), "a column is open and closed"
        known = (self._used | self._leaving | self._sweeping) * 0xF
        for shard in self._shards:
            for state in shard.values():
                assert state and not state & ~known, "a block is in a column that nobody has"
                digits = f"{state:x}"
                assert set(digits) <= set("01248"), f"a block is in two tiers of one worker: {digits}"
        free = [1 << _HEX_DIGIT * number for number in self._free]
        assert len(set(free)) == len(free) and sum(free) | known // 0xF == (1 << _HEX_DIGIT * self._columns) // 0xF
        assert not sum(free) & known, "a free column is in use"


class _Swept(dict[int, int]):
    """States without the columns that are swept, each worked out once."""

    def __init__(self, keep: int, interned: dict[int, int]) -> None:
        super().__init__()
        self._keep, self._interned = keep, interned

    def __missing__(self, state: int) -> int:
        rest = state & self._keep
        self[state] = rest = self._interned.setdefault(rest, rest)
        return rest


class _Walk:
    """Along a prefix, from each block that differs from the one before it."""

    __slots__ = ("_alive", "_ddr", "_lower", "_since", "_ssd", "_state", "found")

    def __init__(self, columns: int) -> None:
        self.found: list[tuple[int, PrefixLength]] = []
        self._alive = columns
        """Those that hold everything so far."""
        self._state = self._since = 0
        self._lower: dict[int, list[int]] = {}
        """By column, for those that have any: blocks in DDR and in SSD."""

    def turn(self, position: int, state: int) -> int:
        """From here on blocks have this state. Returns who still holds all."""
        if lower := (self._state >> 1 | self._state >> 2) & self._alive:
            self._count_lower(lower, position - self._since)
        holders = (state | state >> 1 | state >> 2 | state >> 3) & self._alive
        if lost := self._alive ^ holders:
            if position:
                self._end(lost, position)
            self._alive = holders
        self._state, self._since = state, position
        return holders

    def _count_lower(self, columns: int, blocks: int) -> None:
        for column in columns_in(columns):
            counts = self._lower.setdefault(column, [0, 0])
            counts[self._state >> _HEX_DIGIT * column + 2 & 1] += blocks

    def _end(self, columns: int, blocks: int) -> None:
        if not self._lower:
            self.found.append((columns, PrefixLength(blocks)))
            return
        for column in columns_in(columns):
            ddr, ssd = self._lower.get(column, (0, 0))
            self.found.append((1 << _HEX_DIGIT * column, PrefixLength(blocks - ddr - ssd, ddr, ssd)))


def _with_expected(state: int, columns: Iterable[Column]) -> int:
    for column in columns:
        if not state & column.one * 0xF:
            state |= column.expected
    return state


def columns_in(mask: int) -> list[int]:
    """Their numbers, ascending; the mask has their lowest bits."""
    numbers: list[int] = column_numbers(mask).tolist()
    return numbers


def column_numbers(mask: int) -> NDArray[np.intp]:
    """As an array: masks of hundreds are read at once."""
    digits = np.frombuffer(mask.to_bytes(mask.bit_length() // 8 + 1, "little"), np.uint8)
    return np.unpackbits(digits, bitorder="little")[::_HEX_DIGIT].nonzero()[0]
