"""What a request's KV is promised, as routers tell it."""

from baton.rpc import common_pb2
from engine.interface import Retention


def retention_from_proto(message: common_pb2.CacheRetention) -> Retention:
    """Of a request without one, the empty one."""
    return Retention(message.tenant, max(message.ttl_s, 0.0), message.pin, message.quota_bytes)


def retention_to_proto(retention: Retention) -> common_pb2.CacheRetention:
    return common_pb2.CacheRetention(
        ttl_s=retention.ttl_s, pin=retention.pin, tenant=retention.tenant, quota_bytes=retention.quota_bytes
    )
