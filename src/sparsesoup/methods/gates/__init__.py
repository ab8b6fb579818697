"""Gates: trainable masks implemented as parametrizations; attach before training, fold before making a ticket."""
