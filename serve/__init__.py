"""Serving: the champion behind an HTTP API, on Ray Serve."""
