"""Committed tables, and what the notebooks ask for."""
