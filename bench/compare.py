"""``python -m bench compare``: what changed between two runs on one machine, beyond their noise."""

from collections.abc import Sequence

from .rows import Row, duration, spread

LEAST = 0.05  # a smaller change is never called one


def compare(old: Sequence[Row], new: Sequence[Row]) -> str:
    """A table of the rows that changed by more than both runs' spread, and what only one of them has.

    Raises:
        ValueError: the runs are of different machines.
    """
    devices = {row["device"] for row in (*old, *new)}
    if len(devices) != 1:
        raise ValueError(f"runs of different machines are not compared: {', '.join(sorted(devices))}")
    before, after = ({(row["group"], row["rival"], row["dtype"]): row for row in rows} for rows in (old, new))
    lines = []
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        change = b["median seconds"] / a["median seconds"]
        noise = max(LEAST, spread(a) + spread(b))
        if not 1 / (1 + noise) <= change <= 1 + noise:
            verdict = f"{change:.2f} times as long" if change > 1 else f"{1 / change:.2f} times faster"
            relative = b.get("faster", 1) / a.get("faster", 1)
            cells = (*key, duration(a["median seconds"]), duration(b["median seconds"]), verdict, f"{relative:.2f}")
            lines.append((change, "| " + " | ".join((*cells, f"{100 * noise:.0f} %")) + " |"))
    head = (
        "| problem | rival | dtype | before | after | change | of its ratio to the first rival | noise |\n"
        + "|---" * 8
        + "|"
    )
    text = "\n".join([head, *(line for _, line in sorted(lines, reverse=True))]) if lines else "nothing beyond noise"
    text += f"\n\n{len(before.keys() & after.keys())} rows in both"
    for name, keys in (("before", before.keys() - after.keys()), ("after", after.keys() - before.keys())):
        text += "".join(f"\nonly {name}: {', '.join(key)}" for key in sorted(keys))
    return text
