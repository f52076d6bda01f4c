"""Streams, events and registered memory of a GPU; on the CPU they do nothing."""
