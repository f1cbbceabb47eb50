"""Prefill and decode."""
