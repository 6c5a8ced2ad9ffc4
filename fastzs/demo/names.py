"""Class names as people type them into one field."""

import re

MOST = 1000  # names, so that a pasted book does not occupy the page


def read_names(text: str) -> list[str | dict[str, list[str]]]:
    """The classes of a text, as :class:`fastzs.Vocabulary` takes them.

    Commas, semicolons and line breaks separate classes; ``|`` separates a class from its synonyms:
    ``"road, person | pedestrian | cyclist"``.

    Raises:
        ValueError: no name, too many, or a class with synonyms but without a name.
    """
    classes = [part.strip() for part in re.split(r"[,;\n]", text) if part.strip()]
    if not classes:
        raise ValueError("expected at least one class name, such as 'road, car, sky', got none")
    if (count := text.count("|") + len(classes)) > MOST:
        raise ValueError(f"expected at most {MOST:,} names, got {count:,}")
    entries: list[str | dict[str, list[str]]] = []
    for part in classes:
        name, *synonyms = (phrase.strip() for phrase in part.split("|"))
        if not name:
            raise ValueError(f"expected a class name before the first '|' of {part!r}, got none")
        synonyms = [phrase for phrase in synonyms if phrase]
        entries.append({name: synonyms} if synonyms else name)
    return entries
