"""Experiments that anybody can run in minutes: which claims of the papers hold on small data."""
