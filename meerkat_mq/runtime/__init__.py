"""The drivers: every effect of a machine is carried out once, here, over four ports (docs/architecture.md)."""
