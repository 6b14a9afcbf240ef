"""Times and peak memory of a training step, for `gcahng bench`. Code that disagrees with the reference has no ratio."""
