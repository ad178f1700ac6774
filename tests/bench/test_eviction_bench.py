import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, count
from pathlib import Path
from random import Random

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from baton.ids import BlockHash
from bench.eviction import POLICIES, Load, load_of, main, our_hits, results
from bench.eviction_baselines import Prompts, belady_hits, lfu_hits, lru_hits
from bench.prefix_cache import PrefixCache
from kvcache.eviction.policy import make_policy
from simulator.trace import prompt_block_name, write_trace
from simulator.workloads import Conversations


def load(*prompts: Sequence[int], step_s: float = 1.0) -> Load:
    name = cache(prompt_block_name)
    return Load([step_s * number for number in range(len(prompts))], [[*map(name, prompt)] for prompt in prompts])


def zipf(requests: int, items: int, blocks: int, seed: int) -> Iterator[range]:
    random, weights = Random(seed), [1 / rank for rank in range(1, items + 1)]
    for item in random.choices(range(items), weights, k=requests):
        yield range(item * blocks, (item + 1) * blocks)


def scan(requests: int, blocks: int) -> Iterator[range]:
    starts = count(10**9, blocks)
    for _ in range(requests):
        start = next(starts)
        yield range(start, start + blocks)


@st.composite
def prompts_of_a_tree(draw: st.DrawFn, prompts_max: int = 40) -> Prompts:
    """Every name comes after the same names: what a chained hash stands for."""
    paths = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=prompts_max))
    numbers: dict[tuple[int, ...], int] = {}
    names = cache(prompt_block_name)
    return [
        [names(numbers.setdefault(tuple(path[:end]), len(numbers))) for end in range(1, len(path) + 1)]
        for path in paths
    ]


def most_hits(prompts: Prompts, blocks_max: int) -> int:
    """By trying everything that may be kept after each request."""

    @cache
    def most(request: int, kept: frozenset[BlockHash]) -> int:
        if request == len(prompts):
            return 0
        names = prompts[request]
        hits = next((depth for depth, name in enumerate(names) if name not in kept), len(names))
        may_be_kept = sorted(kept.union(names))
        size = min(blocks_max, len(may_be_kept))
        return hits + max(most(request + 1, frozenset(some)) for some in combinations(may_be_kept, size))

    return most(0, frozenset())


@settings(deadline=None)
@given(prompts_of_a_tree(prompts_max=5), st.integers(1, 3))
def test_belady_is_the_optimum(prompts: Prompts, blocks_max: int) -> None:
    assert belady_hits(prompts, blocks_max) == most_hits(prompts, blocks_max)


@settings(deadline=None)
@given(prompts_of_a_tree(), st.integers(1, 12), st.integers(0, 3))
def test_nobody_finds_more_than_belady(prompts: Prompts, blocks_max: int, seed: int) -> None:
    bound = belady_hits(prompts, blocks_max)
    made = Load([float(number) for number in range(len(prompts))], prompts)
    assert our_hits(made, blocks_max, seed) <= bound
    assert lru_hits(prompts, blocks_max) <= bound
    assert max(lfu_hits(prompts, blocks_max, remembers) for remembers in (False, True)) <= bound


@settings(deadline=None)
@given(prompts_of_a_tree(), st.integers(1, 12))
def test_the_cache_holds_whole_prefixes_and_no_more_than_it_may(prompts: Prompts, blocks_max: int) -> None:
    kept = PrefixCache(blocks_max, 4, make_policy(blocks_max), np.random.default_rng(0))
    for now_s, names in enumerate(prompts):
        expected = next((depth for depth, name in enumerate(names) if name not in kept), len(names))
        assert kept.request(names, float(now_s)) == expected
        assert len(kept) <= blocks_max
        kept.check_integrity()


def test_with_room_for_all_everything_is_found_again() -> None:
    made = load(range(5), range(5, 9), range(5), (0, 1, 10), range(5))
    assert {policy: hits(made, 100) for policy, hits in POLICIES.items()} == dict.fromkeys(POLICIES, 12)


def test_lru_and_lfu_by_hand() -> None:
    prompts = load((0, 1), (2,), (0, 1), (3, 4), (0, 1), (2,)).prompts
    assert lru_hits(prompts, 3) == 3, "of the last (0, 1), the head is still there"
    assert lfu_hits(prompts, 3, remembers=False) == 4, "(0, 1) are kept from the second time on"
    assert belady_hits(prompts, 3) == 5


def test_a_scan_does_not_push_out_what_is_used_again() -> None:
    mixed = [prompt for pair in zip(zipf(800, 200, 4, 1), scan(800, 4), strict=True) for prompt in pair]
    made = load(*mixed, step_s=0.3)
    ours, lru = our_hits(made, 120), lru_hits(made.prompts, 120)
    assert ours > 1.4 * lru
    assert ours > 0.65 * belady_hits(made.prompts, 120)


def test_a_loop_larger_than_the_cache_is_found_in_part() -> None:
    made = load(*(range(item * 5, item * 5 + 5) for _ in range(12) for item in range(60)))
    assert lru_hits(made.prompts, 200) == 0
    assert our_hits(made, 200) > 0.1 * made.blocks


@pytest.mark.parametrize("blocks_max", [100, 400])
def test_conversations_are_found_as_often_as_by_lru(blocks_max: int) -> None:
    made = load_of(Conversations().trace(1000, seed=1))
    assert our_hits(made, blocks_max) >= lru_hits(made.prompts, blocks_max)


def test_a_run_can_be_repeated() -> None:
    made = load_of(Conversations().trace(300, seed=2))
    assert len({our_hits(made, 100) for _ in range(2)}) == 1
    assert [*results(made, [0.1])] == [*results(made, [0.1])]


def test_it_prints_json(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    write_trace(trace, Conversations().trace(100, seed=3))
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(trace), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(each["cache_share"], each["policy"]) for each in found] == [
        (share, policy) for share in (0.01, 0.05, 0.1, 0.3) for policy in POLICIES
    ]
    assert all(0 <= each["hit_rate"] <= 1 for each in found)
    table = CliRunner().invoke(app, [str(trace)])
    assert "belady" in table.stdout and "30%" in table.stdout
    assert CliRunner().invoke(app, [str(tmp_path / "none")]).exit_code == 2
