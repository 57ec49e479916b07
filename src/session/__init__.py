"""Samples through the engine into folders: what `src.run` and `src.sweep` have in common."""
