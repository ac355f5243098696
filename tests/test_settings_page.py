"""Settings page: what docs/settings.md says is what the program does."""

from pathlib import Path

from loraprune.settings import DECLARED
from loraprune.settings_page import page

WRITTEN = Path(__file__).parents[1] / "docs" / "settings.md"


def test_the_page_is_the_generated_one():
    again = "write it again: python -m loraprune.settings_page > docs/settings.md"
    assert WRITTEN.read_text(encoding="utf-8") == page(), again


def test_every_setting_has_one_row():
    rows = [line.split("|")[1].strip() for line in page().splitlines() if line.startswith("| `")]
    assert rows == [f"`{name}`" for name in DECLARED]
