"""`python -m launcher`: the command `baton`, where it is not installed."""

from launcher.cli import main

main()
