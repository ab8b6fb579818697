"""Execution of a study's runs."""
