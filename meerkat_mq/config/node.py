"""`node.toml`."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from meerkat_mq.config.broker import BrokerConfig, room_for_chunks
from meerkat_mq.config.bundle import BundleConfig
from meerkat_mq.config.limits import LimitsConfig
from meerkat_mq.config.policy import PolicyConfig
from meerkat_mq.config.prefix import PrefixConfig
from meerkat_mq.config.schedule import ScheduleConfig
from meerkat_mq.config.section import DataSource, Device, Dtype, EngineName, Flag, Identifier, LocalPath, Section
from meerkat_mq.config.values import NodeValuesConfig


class NodeConfig(Section):
    """node.toml: a node needs only its id, a broker, its data, where the base model is, and a state folder."""

    id: Identifier
    federation: Identifier
    data: DataSource
    state_dir: LocalPath
    engine: EngineName | None = None
    model: str | None = None
    adapter: LocalPath | None = None
    bundle: BundleConfig | None = None
    broker: BrokerConfig = BrokerConfig()
    device: Device = "cpu"
    dtype: Dtype | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    exit_when_finished: Flag = False
    uplink: Literal["path", "values"] = "path"
    values: NodeValuesConfig = NodeValuesConfig()
    schedule: ScheduleConfig | None = None
    limits: LimitsConfig = LimitsConfig()
    policy: PolicyConfig = PolicyConfig()
    prefix: PrefixConfig = PrefixConfig()

    @field_validator("broker")
    @classmethod
    def _of_another_process(cls, broker: BrokerConfig) -> BrokerConfig:
        if broker.url == "embedded":
            raise ValueError('url = "embedded" is for servers; give the address of the federation\'s broker')
        return broker

    @model_validator(mode="after")
    def _adapts_a_model(self) -> Self:
        if self.adapter is not None and self.model is None:
            raise ValueError("adapter is merged into a model: name its base as model")
        return self

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.bundle is not None and self.engine != "onnx":
            raise ValueError('[bundle] is for nodes with engine = "onnx"')
        if self.bundle is not None and self.model is not None:
            raise ValueError("model and [bundle]: give one of them, a bundle's folder or where to fetch it from")
        return self

    @model_validator(mode="after")
    def _displacements_fit(self) -> Self:
        if self.uplink == "values":
            room_for_chunks(self.broker, 'uplink = "values"')
        return self
