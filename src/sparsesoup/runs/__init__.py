"""Runs: their settings, directories and results."""
