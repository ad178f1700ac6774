"""The front door: HTTP and gRPC, tokenizing, placement, streaming."""
