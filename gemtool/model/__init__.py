"""The decoder: configuration, parameters and pure functions over arrays."""
