"""Reports: terminal output, run page, model card."""
