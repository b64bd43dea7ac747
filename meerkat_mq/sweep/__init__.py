"""`meerkat sweep`: a grid of simulated federations on this machine, resumable, with one tidy file of results."""
