"""The table against a dictionary, and names that collide."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baton.ids import BlockHash
from kvcache.name_table import NO_ROW, NameTable


def random_name(rng: random.Random) -> BlockHash:
    return BlockHash(rng.randbytes(16))


def test_it_is_a_dictionary_from_names_to_rows_of_their_own() -> None:
    rng = random.Random(5)
    table, model = NameTable(50), dict[BlockHash, int]()
    for step in range(20_000):
        if model and (len(model) == 50 or rng.random() < 0.5):
            name = rng.choice(list(model))
            table.remove(model.pop(name))
        else:
            name = random_name(rng)
            model[name] = table.enter(name)
        assert len(table) == len(model)
        if step % 100 == 0:
            table.check_integrity()
            assert len(set(model.values())) == len(model)
            absent = [random_name(rng) for _ in range(20)]
            names = [*model, *absent]
            rng.shuffle(names)
            rows = table.find_all(names).tolist()
            assert rows == [model.get(name, NO_ROW) for name in names] == [table.find(name) for name in names]
            kept = np.array(list(model.values()), np.int64)
            assert table.names(kept) == list(model)


def test_a_full_table_says_so_and_gives_rows_again() -> None:
    table = NameTable(3)
    rows = [table.enter(BlockHash(bytes([number] * 16))) for number in range(3)]
    assert sorted(rows) == [1, 2, 3]
    assert table.enter(BlockHash(bytes([9] * 16))) == NO_ROW
    table.remove(rows[1])
    assert table.enter(BlockHash(bytes([9] * 16))) == rows[1]


def test_names_that_all_belong_in_one_place_are_found() -> None:
    table = NameTable(40)
    names = [BlockHash(number.to_bytes(8, "little") * 2) for number in range(1, 41)]  # low ^ high is always 0
    rows = {name: table.enter(name) for name in names}
    for name in names[::3]:
        table.remove(rows.pop(name))
    table.check_integrity()
    assert table.find_all(names).tolist() == [rows.get(name, NO_ROW) for name in names]


def test_memory_grows_with_what_it_holds() -> None:
    table = NameTable(1000)
    for number in range(100):
        table.enter(BlockHash(number.to_bytes(16, "little")))
    assert table.size_bytes == table._table.nbytes + 16 * 101


def name_of(number: int) -> BlockHash:
    return BlockHash((number << 70 | number).to_bytes(16, "little"))


@given(st.sets(st.integers(0, 10**6), max_size=60), st.integers(0, 2**32 - 1))
def test_all_but_some_go_at_once(numbers: set[int], seed: int) -> None:
    """A table so full that probes go past its end."""
    table = NameTable(64)
    rows = {number: table.enter(name_of(number)) for number in numbers}
    kept = {number for number in numbers if random.Random(seed + number).random() < 0.7}
    are_kept = np.zeros(table.rows_used + 1, bool)
    are_kept[[rows[number] for number in kept]] = True
    table.keep(are_kept)
    table.check_integrity()
    assert all(table.find(name_of(number)) == (rows[number] if number in kept else NO_ROW) for number in numbers)
    again = [table.enter(name_of(10**6 + 1 + number)) for number in range(64 - len(kept))]
    assert len({*again, *(rows[number] for number in kept)}) == 64
    table.check_integrity()
