"""Drills: faults on real processes, brokers and links, and what must hold under them."""
