"""Rows of files, folders and the Hub."""
