"""Many runs as one: a recipe of cells, drawn anywhere, and the tables and page that come of them."""
