"""The node service: `python -m meerkat_mq.node --config node.toml`."""
