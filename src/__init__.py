"""The engine room and the entry points of the benchmark."""
