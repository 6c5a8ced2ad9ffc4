"""Hostile and odd inputs, generated from seeds: what each command does with them.

python -m tests.mischief [part of a name]     all cases, or those with the part in their name
"""
