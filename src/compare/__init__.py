"""Finished runs side by side: which may be compared, matched by sample, with intervals."""
