"""What the tiers know of blocks: where they lie, whose they are, and what keeping them is worth."""
