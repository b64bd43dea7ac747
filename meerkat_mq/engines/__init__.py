"""What computes: a model to which theta is written, and which gives a batch's losses."""
