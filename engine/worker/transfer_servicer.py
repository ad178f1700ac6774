"""The gRPC service by which other workers get KV blocks from this one, whatever its role."""

from baton.rpc import transfer_pb2_grpc
from kvtransfer.fetch.servicer import FetchContext, FetchServicer
from kvtransfer.link.servicer import LinkBook, LinkContext

SERVICE = "baton.v1.Transfer"


class TransferServicer(transfer_pb2_grpc.TransferServicer):
    def __init__(self, book: LinkBook, fetches: FetchServicer) -> None:
        self._book, self._fetches = book, fetches

    async def Link(self, request_iterator: object, context: LinkContext) -> None:  # noqa: N802 - gRPC's name
        del request_iterator  # read through the context, which knows the end of the stream
        await self._book.serve(context)

    async def Fetch(self, request_iterator: object, context: FetchContext) -> None:  # noqa: N802 - gRPC's name
        del request_iterator
        await self._fetches.serve(context)
