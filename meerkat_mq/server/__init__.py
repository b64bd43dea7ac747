"""The server service: `python -m meerkat_mq.server --config federation.toml`."""

from meerkat_mq.lazily import lazily

TYPE_CHECKING = False
if TYPE_CHECKING:
    from meerkat_mq.server.service import serve

__all__ = ["serve"]

__getattr__ = lazily(__name__, {"serve": "service"})
