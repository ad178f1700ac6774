"""Which blocks go down, up and out, and when."""
