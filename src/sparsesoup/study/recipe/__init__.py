"""The recipe of a study, read and checked."""
