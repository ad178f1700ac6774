"""The unit of direct I/O."""

PAGE_BYTES = 4096
"""Direct I/O wants offsets, sizes and addresses in whole sectors; a page is a whole number of any disk's."""


def whole_pages(size_bytes: int) -> int:
    """As many bytes, filled up to whole pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
