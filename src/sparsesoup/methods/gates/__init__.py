"""Gates: weights seen through something that is learnt with them; attach before training, fold before a ticket."""
