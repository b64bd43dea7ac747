"""Bytes on the wire: frames, arrays, chunks, topics, and the JSON of the control plane."""
