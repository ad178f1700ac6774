import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_its_generator_writes() -> None:
    made = runpy.run_path(str(DOCS / "generate_settings.py"))["render"]()
    assert (DOCS / "settings.md").read_text() == made, "run: python docs/generate_settings.py"
