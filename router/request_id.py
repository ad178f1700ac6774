"""The ids that clients may choose for their requests."""

import re

from baton.ids import RequestId, new_request_id

SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id_from(given: str) -> RequestId:
    """The client's own id if it is fit for logs and headers, else a new one."""
    return RequestId(given) if SANE_ID.fullmatch(given) else new_request_id()
