"""The commands of ``fastzs``: each module has ``HELP``, ``parser()`` and ``run(config) -> exit code``.

They import torch and all that needs it inside their functions, so that ``--help`` is there at once.
"""
