"""Where tables with many columns go."""

from rich.console import Console

COLUMNS_MIN = 120
"""Where the width of what is written to is not known."""


def wide_console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, COLUMNS_MIN)
    return console
