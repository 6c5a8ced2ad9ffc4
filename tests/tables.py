"""Tables in the pages that are made from the registry: ``python -m tests.tables`` writes them anew."""

from pathlib import Path

from fastzs.registry import table

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"
PAGES = {"README.md": ("paper", "trained", "checkpoints"), "docs/systems.md": ("does", "needs")}


def renewed(page: str) -> str:
    """The text of a page with its table as the registry has it now."""
    before, rest = (ROOT / page).read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + table(*PAGES[page]) + END + rest.split(END)[1]


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(renewed(page), encoding="utf-8")
