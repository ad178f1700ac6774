"""Generated protobuf and gRPC code for proto/baton/v1, and the conversions beside it."""
