"""The drivers' ports in memory."""
