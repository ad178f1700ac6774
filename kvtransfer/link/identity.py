"""Who a worker is to those it moves KV blocks with, and whether two can."""

from dataclasses import dataclass

from baton.errors import InvalidRequest, UnsupportedModel
from baton.layout import DTYPE_BYTES, KVLayout
from baton.rpc import transfer_pb2
from baton.rpc.convert import layout_from_proto

PROTOCOL_VERSION = 1
NONCE_BYTES = 32
WORKER_ID_CHARS_MAX = 256
TRANSPORTS_MAX = 16
TRANSPORT_CHARS_MAX = 32
REGION_BYTES_MAX = 2**53


@dataclass(frozen=True, slots=True)
class LinkIdentity:
    worker_id: str
    fingerprint: str
    layout: KVLayout


def check_hello(hello: transfer_pb2.LinkHello, me: LinkIdentity, *, makes_digests: bool) -> KVLayout:
    """The receiver's layout. Raises InvalidRequest for what no worker says, UnsupportedModel for one that this worker's
    KV blocks are of no use to."""
    if hello.version != PROTOCOL_VERSION:
        raise UnsupportedModel(f"This worker speaks version {PROTOCOL_VERSION} of the link protocol; update the older.")
    _check_form(hello)
    layout = sound_layout(hello.layout)
    if hello.fingerprint != me.fingerprint:
        raise UnsupportedModel("Model, weights or dtype of the two workers differ; their KV blocks must not mix.")
    if reason := me.layout.unconvertible(layout):
        raise UnsupportedModel(reason)
    if hello.wants_digests and not makes_digests:
        raise UnsupportedModel("The receiver verifies KV blocks, and this worker makes no digests; set verify alike.")
    return layout


def sound_layout(message: transfer_pb2.KVLayout) -> KVLayout:
    """Raises InvalidRequest if no region can be so."""
    layout = layout_from_proto(message)
    if layout.dtype not in DTYPE_BYTES or not all(layout.shape) or layout.region_bytes > REGION_BYTES_MAX:
        raise InvalidRequest("This is no KV layout.", "layout")
    return layout


def is_worker_id(text: str) -> bool:
    """Fit for a log line and a metric's label."""
    return 0 < len(text) <= WORKER_ID_CHARS_MAX and text.isprintable()


def _check_form(hello: transfer_pb2.LinkHello) -> None:
    is_sound = (
        len(hello.nonce) == NONCE_BYTES
        and is_worker_id(hello.worker_id)
        and len(hello.transports) <= TRANSPORTS_MAX
        and all(name.isidentifier() and len(name) <= TRANSPORT_CHARS_MAX for name in hello.transports)
    )
    if not is_sound:
        raise InvalidRequest("This is no introduction of a worker.", "hello")
