"""The deterministic simulator: the machines of `rounds/` on a virtual clock, under every fault that a seed can name."""
