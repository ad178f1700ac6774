"""Between machines: slices over plain TCP, received straight into the region."""
