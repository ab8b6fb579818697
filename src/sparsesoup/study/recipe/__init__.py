"""Read and check the recipe of a study."""
