"""The ops: one folder each, with ``api.py`` (validate, choose a backend), ``reference.py`` (the specification) and backends."""
