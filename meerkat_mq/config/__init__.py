"""Configuration files: TOML in, checked objects out; every error names the file, the key and the remedy.

What each key means is in docs/configuration.md, which a test holds against these classes.
"""

from meerkat_mq.config.broker import BrokerConfig
from meerkat_mq.config.bundle import BundleConfig
from meerkat_mq.config.early_stopping import EarlyStoppingConfig
from meerkat_mq.config.evaluation import EvaluationConfig
from meerkat_mq.config.guards import GuardsConfig
from meerkat_mq.config.limits import LimitsConfig
from meerkat_mq.config.load import check_config, load_config, read_toml
from meerkat_mq.config.model import ModelConfig
from meerkat_mq.config.node import NodeConfig
from meerkat_mq.config.policy import PolicyConfig, WeightKind
from meerkat_mq.config.prefix import PrefixConfig
from meerkat_mq.config.rounds import Count, Directions, RoundRules, RoundsConfig, RunSpec
from meerkat_mq.config.schedule import ScheduleConfig
from meerkat_mq.config.section import (
    FIXED,
    HUB_DATA,
    Closed,
    Codec,
    DataSource,
    Device,
    Dtype,
    EngineName,
    Identifier,
    LocalPath,
    Seconds,
    Section,
)
from meerkat_mq.config.server import KeptRules, Rules, ServerConfig
from meerkat_mq.config.values import NodeValuesConfig, ServerValuesConfig

__all__ = [
    "FIXED",
    "HUB_DATA",
    "BrokerConfig",
    "BundleConfig",
    "Closed",
    "Codec",
    "Count",
    "DataSource",
    "Device",
    "Directions",
    "Dtype",
    "EarlyStoppingConfig",
    "EngineName",
    "EvaluationConfig",
    "GuardsConfig",
    "Identifier",
    "KeptRules",
    "LimitsConfig",
    "LocalPath",
    "ModelConfig",
    "NodeConfig",
    "NodeValuesConfig",
    "PolicyConfig",
    "PrefixConfig",
    "RoundRules",
    "RoundsConfig",
    "Rules",
    "RunSpec",
    "ScheduleConfig",
    "Seconds",
    "Section",
    "ServerConfig",
    "ServerValuesConfig",
    "WeightKind",
    "check_config",
    "load_config",
    "read_toml",
]  # fmt: skip
