"""Configuration files: TOML in, checked objects out; every error names the file, the key and the remedy."""

from meerkat_mq.config.broker import BrokerConfig
from meerkat_mq.config.load import check_config, load_config, read_toml
from meerkat_mq.config.schema import (
    EarlyStoppingConfig,
    EvaluationConfig,
    GuardsConfig,
    LimitsConfig,
    ModelConfig,
    NodeConfig,
    NodeValuesConfig,
    RoundsConfig,
    ScheduleConfig,
    ServerConfig,
    ServerValuesConfig,
)
from meerkat_mq.config.section import (
    HUB_DATA,
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

__all__ = [
    "HUB_DATA",
    "BrokerConfig",
    "Codec",
    "DataSource",
    "Device",
    "Dtype",
    "EarlyStoppingConfig",
    "EngineName",
    "EvaluationConfig",
    "GuardsConfig",
    "Identifier",
    "LimitsConfig",
    "LocalPath",
    "ModelConfig",
    "NodeConfig",
    "NodeValuesConfig",
    "RoundsConfig",
    "ScheduleConfig",
    "Seconds",
    "Section",
    "ServerConfig",
    "ServerValuesConfig",
    "check_config",
    "load_config",
    "read_toml",
]
