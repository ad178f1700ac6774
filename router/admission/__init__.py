"""Who may send what, who waits for whom, and who is refused."""
