"""The method's arithmetic: directions, masks, steps, paths. NumPy only; no I/O except the mask file."""
