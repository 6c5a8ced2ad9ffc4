"""The ops: a folder each with ``api.py`` (checks, choice of backend), ``reference.py`` (specification), backends."""
