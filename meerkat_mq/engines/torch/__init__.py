"""torch + transformers: loading, mask scoring, the engine, evaluation, export."""
