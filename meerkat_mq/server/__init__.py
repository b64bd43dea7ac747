"""The server service: `python -m meerkat_mq.server --config federation.toml`."""
