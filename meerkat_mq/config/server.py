"""`federation.toml`."""

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from meerkat_mq.config.broker import BrokerConfig, room_for_chunks
from meerkat_mq.config.early_stopping import EarlyStoppingConfig
from meerkat_mq.config.evaluation import EvaluationConfig
from meerkat_mq.config.guards import GuardsConfig, KeptGuards
from meerkat_mq.config.model import ModelConfig
from meerkat_mq.config.prefix import PrefixConfig
from meerkat_mq.config.rounds import KeptRounds, RoundsConfig
from meerkat_mq.config.section import Dtype, EngineName, Flag, Identifier, LocalPath, Seconds, Section
from meerkat_mq.config.values import ServerValuesConfig


class Rules(Section):
    """What rules a run besides its descriptor: the ledger keeps it, as JSON, as it was at the first start.

    The last two sections are younger than the first ledgers.
    """

    rounds: RoundsConfig
    guards: GuardsConfig
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    values: ServerValuesConfig = ServerValuesConfig()

    @property
    def kept(self) -> dict[str, Any]:
        """As the ledger keeps it."""
        return self.model_dump(mode="json", include=set(Rules.model_fields))


class KeptRules(Rules):
    """The same as a ledger keeps it."""

    rounds: KeptRounds
    guards: KeptGuards


class ServerConfig(Rules):
    """federation.toml."""

    federation: Identifier
    state_dir: LocalPath
    broker: BrokerConfig = BrokerConfig()
    rounds: RoundsConfig = RoundsConfig()
    guards: GuardsConfig = GuardsConfig()
    engine: EngineName = "transformers"
    toy_weights: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    mask: LocalPath | None = None
    task: str | None = None
    dtype: Dtype = "float32"
    model: ModelConfig | None = None
    evaluation: EvaluationConfig | None = None
    prefix: PrefixConfig = PrefixConfig()
    once: Flag = False
    wait_for_nodes_s: Seconds = 120.0

    @field_validator("engine")
    @classmethod
    def _of_a_run(cls, engine: str) -> str:
        if engine == "graph":
            raise ValueError('"graph" is for nodes; name the engine that the file was exported from')
        return engine

    @model_validator(mode="after")
    def _displacements_fit(self) -> Self:
        if self.values.accept:
            room_for_chunks(self.broker, "values.accept = true")
        return self

    @model_validator(mode="after")
    def _trusted_nodes_are_compared_with(self) -> Self:
        if self.guards.trusted and self.rounds.aggregate != "clipped-mean":
            raise ValueError('guards.trusted needs rounds.aggregate = "clipped-mean", whose test uses these nodes')
        return self
