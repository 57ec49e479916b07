"""Finished runs to tables, figures, sentences and one page."""
