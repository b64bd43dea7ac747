"""The demo: its own data, its own small model, and a federation on this machine."""
