"""Between machines: slices over UCX endpoints, received straight into the region."""
