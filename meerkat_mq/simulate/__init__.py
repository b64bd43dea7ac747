"""The deterministic simulator: machines and drivers on a virtual clock, under every fault that a seed can name."""
