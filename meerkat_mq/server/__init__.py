"""The server service: `python -m meerkat_mq.server --config federation.toml`."""

from meerkat_mq.server.service import DIFFERENCE_FILE, serve

__all__ = ["DIFFERENCE_FILE", "serve"]
