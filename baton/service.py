"""A gRPC server's life, the same for routers and workers: bind, serve, say how it is, go away."""

import asyncio
from collections.abc import Callable, Sequence

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.errors import SettingsError

MESSAGE_BYTES_MAX = 64 * 2**20
"""Largest message between routers and workers: a prompt of ten million tokens."""

_KEEPALIVE = [
    # A peer that vanished without a word (power, network, SIGSTOP) is noticed within 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CHANNEL_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
_SERVER_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # Two processes on one port would share its requests without anybody noticing.
    ("grpc.so_reuseport", 0),
]


class GrpcService:
    """One gRPC server with health and reflection.

    `services` are the full names that reflection lists and health answers for, besides "".
    """

    def __init__(
        self, host: str, port: int, services: Sequence[str], message_bytes_max: int = MESSAGE_BYTES_MAX
    ) -> None:
        self._host, self._port, self._services = host, port, services
        options = [*_SERVER_OPTIONS, ("grpc.max_receive_message_length", message_bytes_max)]
        self.server = grpc.aio.server(options=options)
        self._health = health.aio.HealthServicer()

    @property
    def port(self) -> int:
        """The port it listens on; a free one was picked at start if 0 was asked for."""
        return self._port

    async def start(self, register: Callable[[grpc.aio.Server], None]) -> None:
        """Raises SettingsError if the address cannot be had. Health is NOT_SERVING until `set_serving`."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        register(self.server)
        try:
            self._port = self.server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError:
            raise SettingsError(
                f"Port {self._port} on {self._host} cannot be listened on: another process has it, or the address "
                "is not this machine's. Choose another with --grpc-port (0 picks a free one) or --host."
            ) from None
        await self.set_serving(False)
        await self.server.start()

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 0) -> None:
        """Calls still open after `grace_s` are cancelled."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)
        # The handlers of cancelled calls finish in tasks of their own; let them.
        await asyncio.sleep(0)
