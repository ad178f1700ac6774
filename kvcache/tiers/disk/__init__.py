"""The SSD tier's file: slots with headers, found again after a restart."""
