"""Studies: many runs defined by one recipe, executed anywhere, with tables and a page of results."""
