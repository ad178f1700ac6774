"""How views are cut for the socket."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.tcp.stream import SEND_BYTES, SEND_VIEWS_MAX, batches, rest_of


@settings(deadline=None)
@given(st.lists(st.integers(0, 3 * SEND_BYTES), max_size=8), st.integers(0, 200))
def test_batches_are_all_of_it_in_bounded_pieces(sizes: list[int], small: int) -> None:
    views = [memoryview(bytes([i % 251]) * size) for i, size in enumerate([*sizes, *[10] * small])]
    cut = list(batches(views))
    assert b"".join(piece for batch in cut for piece in batch) == b"".join(views)
    for batch in cut:
        assert 1 <= len(batch) <= SEND_VIEWS_MAX
        assert 1 <= sum(map(len, batch)) <= SEND_BYTES


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=10), st.data())
def test_what_the_socket_did_not_take_is_sent_next(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    sent = data.draw(st.integers(0, len(whole)))
    rest = rest_of([memoryview(part) for part in parts], sent)
    assert b"".join(rest) == whole[sent:]
    assert all(map(len, rest))
