"""A run's folder on disk: its files, their schema, their check values."""
