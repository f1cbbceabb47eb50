"""Shards in, checkpoints and metrics out."""
