"""Every file of a run directory: one writer and one reader each."""
