"""The brain: pure state machines. Events in, effects out; no asyncio, no clock, no randomness, no arrays."""
