"""Exports: the forms in which a pruned model is handed on."""
