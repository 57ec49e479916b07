"""KV-cache eviction policies, one file each."""
