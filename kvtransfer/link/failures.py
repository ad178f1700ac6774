"""How a link fails, as the two sides tell each other and their callers."""

import asyncio
from typing import Any

import grpc
import grpc.aio

from baton.errors import (
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    TransferError,
    Unauthorized,
    Unavailable,
)
from baton.rpc.status_codes import status_code
from kvtransfer.link.conversation import LINK_TIMEOUT_S
from kvtransfer.link.metrics import Reason

_SAID_NO = frozenset(
    {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}
)


class TimedOut(Unavailable):
    """The other worker was reached, but did not answer in time."""


def link_status(error: BatonError) -> grpc.StatusCode:
    """With which the sender refuses; what will not pass by itself is told apart from what may."""
    return grpc.StatusCode.FAILED_PRECONDITION if isinstance(error, TransferError) else status_code(error)


async def explain(error: BaseException, call: Any, address: str) -> BaseException:
    """What to raise on the receiver's side where `error` ended the handshake: Unavailable, TransferError or
    Unauthorized; a cancellation of the task, and bugs, as they are."""
    at = f"The worker at {address}"
    match error:
        case asyncio.CancelledError() if _is_cancelled():
            return error
        case DeadlineExceeded() | TimeoutError():
            return TimedOut(f"{at} did not make a link in time ({LINK_TIMEOUT_S:g} s for the whole). {error}".rstrip())
        case Unauthorized():
            return Unauthorized(f"{at} is not trusted: {error}")
        case InvalidRequest():
            return TransferError(f"{at} does not keep to the link protocol: {error}")
        case asyncio.CancelledError() | asyncio.InvalidStateError() | grpc.aio.AioRpcError() | Unavailable():
            return await _ended(call, at)
    return error


async def _ended(call: Any, at: str) -> BatonError:
    if not call.done():
        return Unavailable(f"{at} ended the link before it was ready.")
    code, details = await call.code(), await call.details()
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return Unauthorized(f"{at} does not trust this one: {details}")
    if code in _SAID_NO:
        return TransferError(f"{at} refused a link: {details}")
    return Unavailable(f"{at} cannot be linked with ({code.name}): {details}")


def _is_cancelled() -> bool:
    """Whether it is this task that was cancelled, and not the call beneath it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def failure_kind(error: BatonError) -> Reason:
    match error:
        case Unauthorized():
            return "unauthorized"
        case TimedOut() | DeadlineExceeded():
            return "timeout"
        case Overloaded() | Unavailable():
            return "unreachable"
    return "refused"
