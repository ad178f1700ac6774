import pytest

from bench.measure import Chunk, Completed, Failed, chunk_tokens, percentile, summarize


def completed(start_s: float, arrivals: list[tuple[float, int | None]], output_tokens: int) -> Completed:
    chunks = tuple(Chunk(at_s, tokens) for at_s, tokens in arrivals)
    return Completed(start_s, arrivals[-1][0] + 0.5, chunks, input_tokens=10, output_tokens=output_tokens)


def test_a_chunk_of_several_tokens_counts_as_so_many_gaps() -> None:
    one = completed(0, [(1.0, 2), (2.0, 1), (5.0, 3)], output_tokens=6)
    assert one.ttft_s == 1.0
    assert one.token_gaps == [1.0, 1.0, 1.0, 1.0]
    assert one.end_to_end_s == 5.5


def test_tokens_are_spread_where_the_server_does_not_say() -> None:
    assert chunk_tokens([Chunk(0, None)] * 3, 8) == [3, 3, 2]
    assert chunk_tokens([Chunk(0, None)] * 3, 1) == [1, 1, 1]
    assert chunk_tokens([Chunk(0, 4), Chunk(1, 1)], 5) == [4, 1]


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (99, 99), (100, 100), (0, 1)])
def test_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert percentile(range(100, 0, -1), percent) == expected


def test_percentile_of_nothing_is_none() -> None:
    assert percentile([], 99) is None


def test_rates_are_over_the_time_from_first_start_to_last_end() -> None:
    figures = summarize(
        2,
        [completed(10, [(11, 1), (12, 1)], 2), completed(10.5, [(13, 1), (13.5, 1)], 2), Failed("HTTP 500: x")],
        client_cpu_s=0.4,
    )
    assert figures.duration_s == 4.0
    assert figures.output_tokens_per_s == 1.0
    assert figures.input_tokens_per_s == 5.0
    assert figures.client_cpu_share == pytest.approx(0.1)
    assert (figures.ttft_p50_s, figures.ttft_p99_s) == (1.0, 2.5)
    assert (figures.itl_p50_s, figures.itl_p99_s) == (0.5, 1.0)
    assert (figures.requests, figures.failures, figures.errors) == (3, 1, {"HTTP 500: x": 1})


def test_a_level_without_answers_has_no_times() -> None:
    figures = summarize(1, [Failed("lost"), Failed("lost")], 0)
    assert figures.ttft_p50_s is None
    assert figures.output_tokens_per_s == 0
    assert figures.errors == {"lost": 2}


def test_json_starts_with_the_agreed_keys() -> None:
    assert list(summarize(1, [], 0).as_json())[:7] == [
        "concurrency",
        "ttft_p50_s",
        "ttft_p99_s",
        "itl_p50_s",
        "itl_p99_s",
        "output_tokens_per_s",
        "input_tokens_per_s",
    ]
