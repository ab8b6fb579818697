"""One run: its settings, its directory, its result."""
