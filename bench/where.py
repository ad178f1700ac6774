"""From a profile to where the time went, in the terms of a router. Pure."""

from collections import defaultdict
from collections.abc import Mapping

from bench.child import Stats

PLACES: Mapping[str, tuple[str, ...]] = {
    "detokenizer, stop strings": (
        *("/router/text/detokenizer", "/router/text/stop_strings", "/router/sequence", "/tokenizers/"),
    ),
    "tokenizer, template": ("/router/text/", "/transformers/", "/jinja2/"),
    "placement": ("/router/placement/", "/router/index/", "/kvcache/", "/numpy/", "/baton/latency"),
    "generation, worker streams": ("/router/generation", "/router/worker_pool", "/router/attempt"),
    "admission": ("/router/admission/",),
    "answer, JSON, SSE": (
        *("/router/http/answer", "/router/http/chat", "/router/http/completions", "/router/http/openai_"),
        *("/router/http/errors", "/router/http/io", "/json/", "/pydantic"),
    ),
    "HTTP server": ("/router/http/", "/uvicorn/", "/starlette/", "/fastapi/", "/httptools/"),
    "gRPC, protobuf": ("/router/grpc_", "/grpc/", "/google/", "/baton/rpc/"),
    "metrics": ("/router/metrics", "/prometheus_client/"),
    "asyncio": ("/asyncio/",),
}
"""Files that count as each, by a part of their path; the first that fits. C functions count where they were called."""
OTHER = "other Python"
BELOW = "event loop, sockets, gRPC core (C)"


def shares(stats: Stats, cpu_s: float) -> dict[str, float]:
    """Of the CPU time, greatest first. What Python did not see is what lies below it."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for (file, _, _), (_, _, own_s, _, callers) in stats.items():
        if file == "~":
            for (caller, _, _), (_, _, called_s, _) in callers.items():
                seconds[place_of(caller)] += called_s
        else:
            seconds[place_of(file)] += own_s
    seconds[BELOW] += max(0.0, cpu_s - sum(seconds.values()))
    total_s = sum(seconds.values())
    greatest_first = sorted(seconds.items(), key=lambda item: -item[1])
    return {place: own_s / total_s for place, own_s in greatest_first}


def place_of(file: str) -> str:
    return next((place for place, parts in PLACES.items() if any(part in file for part in parts)), OTHER)
