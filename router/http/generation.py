"""How a generation request by HTTP is answered: by a worker here, or by the model's upstream."""

from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from baton.errors import BatonError, Overloaded, Unavailable
from router.admission.places import Place
from router.frontend import Frontend, Order
from router.generation import Generation
from router.http.answer import Answer, Dialect, collect
from router.http.caller import read_caller
from router.http.errors import error_body, json_response
from router.http.io import EventStream, SendEvent, read_body, while_connected
from router.http.openai_requests import GenerationRequest, parse_request
from router.sequence import Delta
from router.upstream import Reply, guess_prompt_tokens

TOKENS_GUESS = 512
"""Of an upstream's answer to a request without a limit, until it is there."""
UPSTREAM_HEADER = "x-baton-upstream"
"""Says of an answer that the model's upstream gave it, and why: overflow, fallback or always."""


async def generate(http: Request, frontend: Frontend, dialect: Dialect[Any]) -> Response:
    """The answer, or a stream of it that begins with the first token: what fails before has a status."""
    caller = read_caller(http, frontend)
    async with AsyncExitStack() as held:
        place = held.enter_context(frontend.admission.enter())
        body = await read_body(http, frontend.settings.body_bytes_max)
        request = parse_request(dialect.request, body)
        order = Order.of(frontend, caller, request.model, request.request_class)
        http.state.model = order.served.name
        upstream = order.served.upstream
        if upstream is None or upstream.use != "always":
            try:
                return await _answer(http, order, dialect, request, place, held)
            except (Overloaded, Unavailable) as error:
                if upstream is None or frontend.admission.is_closed or not upstream.takes(error):
                    raise
        return await _forward(http, order, dialect, request, body, held)


async def _answer(
    http: Request,
    order: Order,
    dialect: Dialect[Any],
    request: GenerationRequest,
    place: Place,
    held: AsyncExitStack,
) -> Response:
    """From the workers here. What it takes is given back when it raises, or as `held` closes."""
    async with AsyncExitStack() as own:
        place.widen(dialect.count(request))

        async def begin() -> tuple[Generation, tuple[int, Delta] | None]:
            sequences = await dialect.sequences(request, order)
            generation = await order.start(http.state.request_id, sequences, own)
            return generation, await generation.next() if request.stream else None

        generation, first = await while_connected(http.receive, begin())
        answer = dialect.answer(request, generation, order.served, int(order.frontend.wall_clock()))
        if first is None:
            return json_response(answer.whole(await while_connected(http.receive, collect(generation))))

        write = partial(_write_events, answer, generation, first)
        held.push_async_callback(own.pop_all().aclose)
        return EventStream(write, held.pop_all().aclose, order.frontend.settings.request_timeout_s)


async def _write_events(
    answer: Answer[Any], generation: Generation, first: tuple[int, Delta], send_event: SendEvent
) -> None:
    """All chunks and the end mark; a stream that fails ends with an error instead of the mark."""
    try:
        for chunk in answer.opening():
            await send_event(chunk)
        item: tuple[int, Delta] | None = first
        while item is not None:
            if (event := answer.event(*item)) is not None:
                await send_event(event)
            item = await generation.next()
        for chunk in answer.closing():
            await send_event(chunk)
    except BatonError as error:
        await send_event(error_body(error))
    else:
        await send_event("[DONE]")


async def _forward(
    http: Request,
    order: Order,
    dialect: Dialect[Any],
    request: GenerationRequest,
    body: bytes,
    held: AsyncExitStack,
) -> Response:
    """From the upstream, as it comes; under the name that the upstream has for the model."""
    frontend, upstream = order.frontend, order.served.upstream
    assert upstream is not None
    sequences, tokens = dialect.count(request), request.tokens_asked
    reply: Reply | None = None

    async def send() -> Reply:
        turn = await order.turn_upstream(
            guess_prompt_tokens(body), TOKENS_GUESS if tokens is None else max(tokens, 0), sequences
        )
        held.callback(lambda: turn.close(0 if reply is None else reply.used_tokens))
        return await upstream.forward(dialect.endpoint, body, http.state.request_id, order.remaining_s())

    reply = await while_connected(http.receive, send())
    held.push_async_callback(reply.close)
    headers = {UPSTREAM_HEADER: upstream.use}
    if not reply.is_stream:
        whole = await while_connected(http.receive, reply.whole())
        return Response(whole, reply.status, headers, reply.content_type)
    write = partial(_write_lines, reply)
    return EventStream(write, held.pop_all().aclose, frontend.settings.request_timeout_s, headers)


async def _write_lines(reply: Reply, send_event: SendEvent) -> None:
    """A stream that breaks ends with an error, which an empty line parts from what came before."""
    try:
        while lines := await reply.lines():
            await send_event(lines)
    except BatonError as error:
        await send_event(b"\n")
        await send_event(error_body(error))
