"""Two tiers: ``pytest`` runs every behaviour once, ``pytest -m slow`` what takes interpreters, compilers or processes.

``pytest -m "slow or not slow"`` runs both.
"""


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and len(slow) < len(items):  # a file or a test that is named runs, even where all of it is slow
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
