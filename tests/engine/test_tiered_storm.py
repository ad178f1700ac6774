"""Everything that an engine with tiers is asked for, at once and at random: nothing wrong is ever told."""

from random import Random

import pytest
from fake_tiers import FakeTiers, ToyRows
from toy_engine import ToyEngine, toy_entries, toy_reference

from baton.ids import RequestId
from baton.sampling import SamplingParams
from engine.interface import Prefill, Reserved, Retention
from engine.scheduler import Limits
from kvcache.block_hash import block_hashes, root_hash

BLOCK_TOKENS = 4
REQUESTS = 80
STEPS_MAX = 6000


class Storm:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now_s = 100.0
        random = self.random
        limits = Limits(chunk_tokens=random.choice([6, 8, 16]), sequences_max=5, waiting_max=128)
        self.toy = ToyEngine(
            blocks=24,
            limits=limits,
            clock=lambda: self.now_s,
            tiers=lambda region: FakeTiers(ToyRows(region), random.choice([20, 1000]), at_once=False),
        )
        tiers = self.toy.engine.tiers
        assert isinstance(tiers, FakeTiers)
        self.tiers = tiers
        tiers.pass_time = self._pass_time
        tiers.copies_down_early = random.random() < 0.5
        self.prefixes = [tuple(random.randrange(1, 50) for _ in range(random.randrange(8, 41))) for _ in range(12)]
        self.prompts: dict[RequestId, tuple[int, ...]] = {}
        self.expected: dict[RequestId, list[int]] = {}
        self.open: dict[RequestId, Prefill] = {}
        self.reserved: list[tuple[tuple[int, ...], Reserved]] = []
        self.promoted, self.promotions = 0, 0
        self.failed = 0

    def _pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    def prompt(self) -> tuple[int, ...]:
        random = self.random
        return (*random.choice(self.prefixes), *(random.randrange(1, 50) for _ in range(random.randrange(1, 6))))

    def run(self) -> None:
        for number in range(REQUESTS):
            self.ask(f"r{number}")
            for _ in range(self.random.randrange(0, 8)):
                self.turn()
        for _ in range(STEPS_MAX):
            if not self.open and not self.reserved and self.promoted == self.promotions:
                return
            self.turn()
        raise AssertionError("it never came to an end")

    def ask(self, name: str) -> None:
        kind = self.random.choice([Prefill.HERE, Prefill.HERE, Prefill.ELSEWHERE, Prefill.ONLY])
        prompt, tokens = self.prompt(), self.random.randrange(1, 9)
        request_id = self.toy.add(name, prompt, kind, max_tokens=tokens)
        params = SamplingParams(max_tokens=1 if kind is Prefill.ONLY else tokens, ignore_eos=True)
        self.prompts[request_id], self.open[request_id] = prompt, kind
        self.expected[request_id] = toy_reference(prompt, params, 1 << 10)

    def turn(self) -> None:
        self.some_restores()
        self.now_s += self.random.choice([0.0, 0.001, 0.03])
        chance = self.random.random()
        if chance < 0.05:
            self.abort()
        elif chance < 0.1:
            self.promote()
        elif chance < 0.15:
            self.reserve()
        elif chance < 0.3 and self.reserved:
            self.adopt()
        if self.toy.engine.has_work:
            self.step()

    def step(self) -> None:
        result = self.toy.step()
        for admitted in result.admitted:
            if self.open.get(admitted.request_id) is Prefill.ELSEWHERE:
                self.answer(admitted.request_id)
        for generated in result.generated:
            if generated.finish_reason:
                self.finish(generated.request_id)
        for failed in result.failed:
            assert self.open.pop(failed.request_id) is Prefill.ONLY
            del self.expected[failed.request_id]
            self.failed += 1

    def answer(self, name: RequestId) -> None:
        """Somebody else's prefill comes, or does not."""
        chance, engine = self.random.random(), self.toy.engine
        if chance < 0.3:
            engine.prefill_here(name)
        elif chance < 0.4:
            engine.abandon(name)
            engine.reclaim(name)
            self.forget(name)
        else:
            admitted, entries = self.toy.admitted[name], toy_entries(self.prompts[name])
            for position in range(admitted.cached_tokens, len(entries)):
                block = admitted.blocks[position // BLOCK_TOKENS]
                self.toy.region.entries[block][position % BLOCK_TOKENS] = entries[position]
            engine.commit(name, self.expected[name][0], ())

    def finish(self, name: RequestId) -> None:
        assert self.toy.outputs[name] == self.expected.pop(name)
        if self.open.pop(name) is Prefill.ONLY:
            prompt = self.prompts[name]
            assert self.toy.stored(name, len(prompt)) == toy_entries(prompt)
            self.toy.engine.release(name)

    def forget(self, name: RequestId) -> None:
        del self.open[name], self.expected[name]

    def abort(self) -> None:
        if self.open:
            name = self.random.choice(list(self.open))
            self.toy.engine.abort(name)
            self.forget(name)

    def some_restores(self) -> None:
        for restore in self.tiers.restores:
            if restore.result is None and self.random.random() < 0.3:
                self.tiers.corrupt = {self.random.choice(restore.names)} if self.random.random() < 0.2 else set()
                restore.finish()
        self.tiers.corrupt = set()

    def promote(self) -> None:
        names = block_hashes(root_hash("toy", BLOCK_TOKENS, "float32"), self.prompt(), BLOCK_TOKENS)
        self.promotions += self.toy.engine.promote(names, self._promoted)

    def _promoted(self) -> None:
        self.promoted += 1

    def reserve(self) -> None:
        prompt = self.prompt()
        self.reserved.append((prompt, self.toy.engine.reserve(prompt, "", 8)))

    def adopt(self) -> None:
        prompt, reserved = self.reserved.pop(self.random.randrange(len(self.reserved)))
        names = block_hashes(root_hash("toy", BLOCK_TOKENS, "float32"), prompt, BLOCK_TOKENS)
        count = self.random.randrange(len(reserved.blocks) + 1)
        entries = toy_entries(prompt)
        for name, block in list(zip(reserved.names, reserved.blocks, strict=True))[:count]:
            first = names.index(name) * BLOCK_TOKENS
            self.toy.region.entries[block] = entries[first : first + BLOCK_TOKENS]
        digests = self.toy.region.digests(reserved.blocks[:count])
        self.toy.engine.adopt(reserved, digests, Retention("acme"))
        self.toy.engine.check_integrity()


@pytest.mark.parametrize("seed", range(25))
def test_a_storm(seed: int) -> None:
    storm = Storm(seed)
    storm.run()
    storm.tiers.copies_down_early = False
    storm.tiers.wake()
    storm.toy.run()
    storm.toy.assert_idle()
    outcomes = [restore.result for restore in storm.tiers.restores if restore.result]
    assert any(outcome.reason for outcome in outcomes) and any(not outcome.reason for outcome in outcomes)
