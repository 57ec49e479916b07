"""Tasks, prompts and metrics. Nothing here knows about caches."""
