"""Load dataset rows from files, folders and the Hub."""
