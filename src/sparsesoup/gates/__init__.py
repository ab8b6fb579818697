"""Gates: a weight seen through a learned mask. Attach, train, fold."""
