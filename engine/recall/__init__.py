"""The bundled demo model, whose weights are constructed: it is wrong the moment a KV block is."""
