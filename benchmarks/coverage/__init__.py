"""How many image networks take temporal layers: ``adapt`` tried on all that the packages have."""
