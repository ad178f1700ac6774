"""What is used of UCX: contexts, workers and endpoints by ucxx, messages by libucp itself.

ucxx's own requests will not do: none can be cancelled alone, and those that an endpoint cancels when it closes hold on
to it and to its worker for ever. libucp's tag messages are four functions of an interface that has been stable since
UCX 1.10, and cost less.
"""

import ctypes
import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from baton.errors import TransferError

OPTIONS: Mapping[str, str] = {
    "TLS": "^sysv,posix",  # they cannot tell that a peer died, so they are not used, but each worker would pay for them
    "RNDV_THRESH": "8192",  # from here on a message waits at the sender until the receiver has a place for it
    "MAX_RNDV_RAILS": "1",
}
"""An operator's environment variables (UCX_TLS and so on) go before these."""
_LOADING = {"UCX_LOG_LEVEL": "fatal"}
"""Read once, when the library is loaded: that a peer died is for our errors to say."""
_IN_PROGRESS = 1
_FIRST_ERROR = 2**64 - 100
"""A pointer from here on is a negative status."""


class _Parameters(ctypes.Structure):
    """ucp_request_param_t without any of its optional fields; longer than it is in any version."""

    _fields_ = (("op_attr_mask", ctypes.c_uint32), ("unused", ctypes.c_byte * 252))


class Ucx:
    """The loaded libraries. Raises TransferError if they are not installed or do not load."""

    def __init__(self) -> None:
        try:
            with _environment_for_loading():
                self.api: Any = importlib.import_module("ucxx._lib.libucxx")
            ucp: Any = ctypes.CDLL("libucp.so.0")  # the one that ucxx has loaded
        except (ImportError, OSError) as error:
            raise TransferError(f"UCX could not be loaded: {error}.") from None
        self._ucp, self._parameters = ucp, ctypes.byref(_Parameters())
        pointer, size, tag = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
        parameters = ctypes.c_void_p
        ucp.ucp_tag_send_nbx.argtypes = (pointer, pointer, size, tag, parameters)
        ucp.ucp_tag_recv_nbx.argtypes = (pointer, pointer, size, tag, tag, parameters)
        ucp.ucp_tag_send_nbx.restype = ucp.ucp_tag_recv_nbx.restype = pointer
        ucp.ucp_request_check_status.argtypes = ucp.ucp_request_free.argtypes = (pointer,)
        ucp.ucp_request_check_status.restype = ctypes.c_int8
        ucp.ucp_request_cancel.argtypes = (pointer, pointer)
        ucp.ucp_request_free.restype = ucp.ucp_request_cancel.restype = None
        ucp.ucp_worker_progress.argtypes = (pointer,)
        ucp.ucp_worker_progress.restype = ctypes.c_uint

    def send(self, endpoint: int, address: int, size_bytes: int, tag: int) -> int:
        """A request, or 0 if it is done already. The bytes are read until it is."""
        return self._begun(self._ucp.ucp_tag_send_nbx(endpoint, address, size_bytes, tag, self._parameters))

    def receive(self, worker: int, address: int, size_bytes: int, tag: int) -> int:
        """A request, or 0 if it is done already. The bytes are written until it is."""
        exactly = 2**64 - 1
        return self._begun(self._ucp.ucp_tag_recv_nbx(worker, address, size_bytes, tag, exactly, self._parameters))

    def cancel(self, worker: int, request: int) -> None:
        """It is done soon, unless bytes are moving already."""
        self._ucp.ucp_request_cancel(worker, request)

    def is_done(self, request: int) -> bool:
        """Once it is, the request is gone. Raises TransferError if it failed."""
        status = self._ucp.ucp_request_check_status(request)
        if status == _IN_PROGRESS:
            return False
        self._ucp.ucp_request_free(request)
        if status < 0:
            raise TransferError(f"UCX could not move a message (status {status}).")
        return True

    def progress(self, worker: int) -> bool:
        """A step of what is under way; false if there was nothing to do."""
        return bool(self._ucp.ucp_worker_progress(worker))

    @staticmethod
    def _begun(request: int | None) -> int:
        if request is not None and request >= _FIRST_ERROR:
            raise TransferError(f"UCX did not take a message (status {request - 2**64}).")
        return request or 0


@contextmanager
def _environment_for_loading() -> Iterator[None]:
    """ucxx sets UCX_* variables for the whole process, where NIXL's UCX and every child would find them."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in _LOADING.items() if name not in before})
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


class Context:
    """One port's use of UCX, loaded when it is first asked for."""

    def __init__(self, net_devices: str) -> None:
        self._net_devices = net_devices
        self._ucx: Ucx | None = None

    @property
    def ucx(self) -> Ucx:
        if self._ucx is None:
            self._ucx = Ucx()
        return self._ucx

    def make_worker(self) -> Any:
        """A ucxx UCXWorker that can be waited on by its file descriptor, in a UCX context of its own: workers of one
        context share what memory is registered, and its release may call one that is gone. Raises TransferError."""
        api = self.ucx.api
        try:
            context = api.UCXContext(self._options(), (api.Feature.TAG, api.Feature.WAKEUP))
            worker = api.UCXWorker(context)
            worker.init_blocking_progress_mode()
        except (api.UCXError, RuntimeError) as error:
            raise TransferError(f"UCX could not be opened: {error}.") from None
        return worker

    def _options(self) -> dict[str, str]:
        wanted = {**OPTIONS, "NET_DEVICES": self._net_devices}
        return {name: value for name, value in wanted.items() if f"UCX_{name}" not in os.environ}
