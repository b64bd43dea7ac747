"""The node service: `python -m meerkat_mq.node --config node.toml`."""

from meerkat_mq.lazily import lazily

TYPE_CHECKING = False
if TYPE_CHECKING:
    from meerkat_mq.node.service import run_node

__all__ = ["run_node"]

__getattr__ = lazily(__name__, {"run_node": "service"})
