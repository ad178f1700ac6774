"""What can go wrong for reasons outside this code, as one tree.

BatonError
├── InvalidRequest     the caller's request cannot be served as it is; `param` names the field
│   └── ModelNotFound  no such model is served here
├── Unauthorized       no API key, or none that is known
├── Overloaded         a stated bound is reached; try again after `retry_after_s`
│   └── RateLimited    the tenant's own bound, not the server's
├── Unavailable        nobody can serve this now: no worker, or it was lost on the way
├── DeadlineExceeded   the caller's deadline passed
├── UnsupportedModel   this model cannot be served right; the message says why
├── SettingsError      a setting, flag or environment variable is wrong
├── ClusterError       Redis cannot be reached or does not answer as Redis
└── TransferError      KV blocks could not be moved

Every message is a sentence or more that says what happened, why, and what to do; it never holds
a prompt, generated text or a secret.
"""


class BatonError(Exception):
    """Root of the tree; the message is fit for the caller's eyes."""


class InvalidRequest(BatonError):
    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(InvalidRequest):
    pass


class Unauthorized(BatonError):
    pass


class Overloaded(BatonError):
    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    pass


class Unavailable(BatonError):
    pass


class DeadlineExceeded(BatonError):
    pass


class UnsupportedModel(BatonError):
    pass


class SettingsError(BatonError):
    pass


class ClusterError(BatonError):
    pass


class TransferError(BatonError):
    pass
