"""The table against a dictionary, and names that collide."""

import random

import numpy as np

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
            model[name] = table.add(name)
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
    rows = [table.add(BlockHash(bytes([number] * 16))) for number in range(3)]
    assert sorted(rows) == [1, 2, 3]
    assert table.add(BlockHash(bytes([9] * 16))) == NO_ROW
    table.remove(rows[1])
    assert table.add(BlockHash(bytes([9] * 16))) == rows[1]


def test_names_that_all_belong_in_one_place_are_found() -> None:
    table = NameTable(40)
    names = [BlockHash(number.to_bytes(8, "little") * 2) for number in range(1, 41)]  # low ^ high is always 0
    rows = {name: table.add(name) for name in names}
    for name in names[::3]:
        table.remove(rows.pop(name))
    table.check_integrity()
    assert table.find_all(names).tolist() == [rows.get(name, NO_ROW) for name in names]


def test_memory_grows_with_what_it_holds() -> None:
    table = NameTable(1000)
    for number in range(100):
        table.add(BlockHash(number.to_bytes(16, "little")))
    assert table.size_bytes == table._table.nbytes + 16 * 101
