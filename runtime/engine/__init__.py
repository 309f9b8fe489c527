"""Runs a bundle's graphs: sessions, KV buffers, prebuilt bindings, the stack of segments. Knows nothing about text."""
