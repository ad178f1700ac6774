"""The devices below HBM in virtual time, under the real store of kvcache.tiers."""
