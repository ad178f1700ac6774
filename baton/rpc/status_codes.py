"""Which gRPC status each error of the house becomes."""

import grpc

from baton import errors

_CODES: dict[type[errors.BatonError], grpc.StatusCode] = {
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthorized: grpc.StatusCode.UNAUTHENTICATED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.UnsupportedModel: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SettingsError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ClusterError: grpc.StatusCode.UNAVAILABLE,
    errors.TransferError: grpc.StatusCode.UNAVAILABLE,
}


def status_code(error: errors.BatonError) -> grpc.StatusCode:
    """The code of the error's own class, else of its nearest ancestor that has one, else INTERNAL."""
    for ancestor in type(error).__mro__:
        if ancestor in _CODES:
            return _CODES[ancestor]
    return grpc.StatusCode.INTERNAL
