"""Settings page: docs/settings.md, written from the settings themselves.

Reads    Settings
Gives    page; `python -m loraprune.settings_page > docs/settings.md`
Source   -
Symbols  -
"""

import itertools

from loraprune.settings import allowed_text, default_text, flag, kind_of, section_of, setting_names, text_of

INTRODUCTION = """# Settings

Every setting of a run, by section. On the command line a setting is its flag; in a file given by `--config` it is its
name, and flags override the file. `loraprune COMMAND --help` lists those that a command takes. A setting that does not
exist is refused, and so is a value out of range. A list is written with commas, or its flag is repeated.

This page is generated: `python -m loraprune.settings_page > docs/settings.md`.
"""
HEADING = "| setting | flag | default | range | effect |\n|---|---|---|---|---|"


def page() -> str:
    """Return the page as Markdown: one table per section."""
    sections = itertools.groupby(setting_names(), section_of)
    return "\n".join([INTRODUCTION, *(_table(section, list(names)) for section, names in sections)])


def _table(section: str, names: list[str]) -> str:
    return "\n".join([f"## {section}", "", HEADING, *map(_row, names), ""])


def _row(name: str) -> str:
    cells = (f"`{name}`", _flag(name), f"`{default_text(name)}`", allowed_text(name), text_of(name))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _flag(name: str) -> str:
    if name == "model":
        return "`MODEL`, the first word"
    return f"`{flag(name)}`, `--no-{flag(name)[2:]}`" if kind_of(name) is bool else f"`{flag(name)}`"


if __name__ == "__main__":
    print(page(), end="")
