"""Between machines and devices: the receiving worker reads the sender's region by NIXL."""
