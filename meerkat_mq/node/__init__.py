"""The node service: `python -m meerkat_mq.node --config node.toml`."""

from meerkat_mq.node.service import run_node

__all__ = ["run_node"]
