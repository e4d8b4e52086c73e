"""Sinks: where a run's numbers are shown besides its own files."""
