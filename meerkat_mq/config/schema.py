"""`federation.toml` and `node.toml`: one class a section."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from meerkat_mq.config.broker import BrokerConfig
from meerkat_mq.config.section import (
    Codec,
    DataSource,
    Device,
    Dtype,
    EngineName,
    Flag,
    Identifier,
    LocalPath,
    Seconds,
    Section,
    Share,
)

DEFAULT_EXPONENT = 0.5
CHUNK_PACKET_BYTES = 2**16 + 1024  # a chunk of 64 KiB, its header, its topic


class ModelConfig(Section):
    """The base model, where a server has one for evaluation and masks.

    Attributes:
        source: local folder or hub id.
    """

    source: str
    dtype: Dtype = "float32"
    device: Device = "cpu"


class RoundsConfig(Section):
    """The rounds.

    Attributes:
        count: rounds of the run.
        local_steps: T.
        directions: P, the direction lanes; 1 ≤ P ≤ nodes asked. Default: a lane for every three nodes.
        lr: learning rate.
        eps: perturbation scale.
        perturbations: projected gradients a local step, along as many directions from one point (DeComFL's P).
        batch_size: rows a local step.
        stream: direction stream.
        min_nodes: nodes that must be at hand before a round opens; never fewer than `min_updates`.
        min_updates: usable updates, each of another node, that a round takes at least to close (docs/guards.md). Below
            three nothing can be compared, and one node alone can ruin the model.
        fraction: share of the nodes at hand that a round asks; at least `min_updates` nodes.
        quorum: share of the nodes asked that a round needs.
        deadline_s: a round closes at the latest then, if the quorum is met.
        grace_s: a node counts as dead this long after its death was announced.
        digest_every: theta's digest is computed every so many versions; divides count, so that the last has one.
        weigh_by_rows: weigh nodes by their number of rows instead of equally.
        aggregate: how a lane's projected gradients become one.
        trim: share of a lane's nodes that "trimmed-mean" leaves out at each end.
        snapshot_every: theta is kept as a file every so many versions, for nodes and servers that come back.
        mode: "synchronous": a round waits for its nodes; "buffered": it takes what comes, from newer and older theta
            (docs/buffered.md).
        buffer_size: updates that close a buffered round; at its deadline one suffices.
        max_staleness: of a buffered run: how many versions old the theta of an update may be.
        staleness: how a buffered run weighs updates from a theta τ versions old: "constant" 1, "polynomial" 1/(1+τ)^a.
        staleness_exponent: a.
    """

    count: Annotated[int, Field(ge=1, lt=2**32)] = 100
    local_steps: Annotated[int, Field(ge=1, le=1000)] = 1
    directions: Annotated[int, Field(ge=1, le=4096)] | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-3
    eps: Annotated[float, Field(gt=0)] = 1e-3
    perturbations: Annotated[int, Field(ge=1, le=1000)] = 1
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    stream: Literal["mk1", "rademacher"] = "mk1"
    min_nodes: Annotated[int, Field(ge=1, le=65535)] = 1
    min_updates: Annotated[int, Field(ge=1, le=65535)] = 3
    fraction: Share = 1.0
    quorum: Share = 0.5
    deadline_s: Seconds = 60.0
    grace_s: Annotated[float, Field(ge=0, le=86_400)] = 2.0
    digest_every: Annotated[int, Field(ge=1)] = 1
    weigh_by_rows: Flag = False
    aggregate: Literal["mean", "trimmed-mean"] = "mean"
    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    snapshot_every: Annotated[int, Field(ge=1)] = 500
    mode: Literal["synchronous", "buffered"] = "synchronous"
    buffer_size: Annotated[int, Field(ge=1, le=65535)] = 8
    max_staleness: Annotated[int, Field(ge=0, le=1000)] = 20
    staleness: Literal["constant", "polynomial"] = "polynomial"
    staleness_exponent: Annotated[float, Field(gt=0, le=10)] = DEFAULT_EXPONENT

    @model_validator(mode="after")
    def _buffered_rules_in_a_buffered_run(self) -> Self:
        if self.mode == "synchronous":
            for key in ("buffer_size", "max_staleness", "staleness", "staleness_exponent"):
                if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f'{key} does nothing in a synchronous run: set mode = "buffered"')
        elif self.staleness == "constant" and self.staleness_exponent != DEFAULT_EXPONENT:
            raise ValueError('staleness_exponent does nothing with staleness = "constant": remove one of the two')
        elif self.fraction < 1:
            raise ValueError("fraction is for synchronous rounds: a buffered one asks every node at hand")
        return self

    @model_validator(mode="after")
    def _last_version_has_a_digest(self) -> Self:
        if self.count % self.digest_every:
            raise ValueError(f"digest_every = {self.digest_every} must divide count = {self.count}")
        return self


class GuardsConfig(Section):
    """What makes the server refuse projected gradients (docs/guards.md).

    Attributes:
        outlier: robust z-score above which one is refused, unless the node's own past excuses it: against the lane's
            nodes of the round where there are three, else against the magnitudes in all lanes.
        against: correlation with the median of the lane's others, over the window, below which a node counts as working
            against them, and is refused; -1: never. Needs ten rounds.
        window: rounds of past that a node is judged by.
        max_step: how far one projected gradient, or one local step of a displacement, may move the weights: lr·|g|, or
            the root mean square, in multiples of that of theta_0's weights; 0: no bound but that of float32. It holds
            from the first update on, and is fixed for a run.
    """

    outlier: Annotated[float, Field(gt=1)] = 8.0
    against: Annotated[float, Field(ge=-1, lt=0)] = -0.5
    window: Annotated[int, Field(ge=5, le=1000)] = 20
    max_step: Annotated[float, Field(ge=0)] = 50.0


class EarlyStoppingConfig(Section):
    """Meerkat-vp: nodes with extremely skewed data do fewer local steps a round (docs/early-stopping.md).

    Attributes:
        by: "vpcs" judges each node by the GradIP of its virtual path; "random", the control, draws nodes; "off".
        steps: local steps a round of an early-stopped node.
        calibration_steps: local steps, of every node, in a round that calibrates, the first one; a round's count.
        every: rounds from one calibration to the next, at least 2; 0: never again.
        initial: share of the calibration steps that are its initial part.
        later: share of them, from the end, that are its later part.
        rho_later: least ratio of mean |GradIP| in the initial part to that in the later part.
        rho_quiet: least share of quiet steps in the later part: |GradIP| below `quiet`.
        quiet: level σ, as a part of the node's mean |GradIP| in the initial part.
        require: whether both conditions flag a node, or one is enough.
        random_share: share of the nodes that "random" draws.
    """

    by: Literal["off", "vpcs", "random"] = "off"
    steps: Annotated[int, Field(ge=1, le=1000)] = 1
    calibration_steps: Annotated[int, Field(ge=4, le=1000)] = 200
    every: Annotated[int, Field(ge=0)] = 0
    initial: Annotated[float, Field(gt=0, le=0.5)] = 0.2
    later: Annotated[float, Field(gt=0, le=0.5)] = 0.5
    rho_later: Annotated[float, Field(gt=0)] = 2.5
    rho_quiet: Share = 0.5
    quiet: Annotated[float, Field(gt=0)] = 0.2
    require: Literal["both", "either"] = "both"
    random_share: Share = 0.25

    @field_validator("every")
    @classmethod
    def _not_always(cls, every: int) -> int:
        if every == 1:
            raise ValueError("must be 0, or at least 2: where every round calibrates, nobody does fewer steps")
        return every


class ServerValuesConfig(Section):
    """Values nodes, as the server treats them (docs/values.md).

    Attributes:
        accept: whether nodes may send displacements instead of projected gradients; these cannot be replayed.
        codec: how the mean displacement is encoded for everybody.
    """

    accept: Flag = False
    codec: Codec = "bfloat16"


class NodeValuesConfig(Section):
    """What a values node does and sends (docs/values.md).

    Attributes:
        optimiser: of the local steps on the masked weights; its state does not outlive a round.
        lr: its learning rate; not the run's, which is that of projected gradients.
        codec: how the displacement is encoded; what an encoding leaves out is added to the next one (error feedback).
    """

    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    codec: Codec = "int8"


class ScheduleConfig(Section):
    """When a duty-cycled node is awake (docs/duty-cycle.md).

    Attributes:
        every_s: from one waking to the next; up to a tenth less, at random.
        awake_s: it goes to sleep after that long at the latest, unless it is catching up; sooner when its update is
            heard. Local steps go on while it is asleep. Default: 60, or `every_s` where that is less.
    """

    every_s: Annotated[float, Field(ge=1, le=86_400 * 7)]
    awake_s: Annotated[float, Field(ge=1, le=86_400)] = 60.0

    @model_validator(mode="before")
    @classmethod
    def _awake_all_of_a_short_time(cls, table: object) -> object:
        every_s = table.get("every_s") if isinstance(table, dict) and "awake_s" not in table else None
        short = isinstance(every_s, int | float) and every_s < 60
        return {**table, "awake_s": every_s} if isinstance(table, dict) and short else table

    @model_validator(mode="after")
    def _sleeps(self) -> Self:
        if self.awake_s > self.every_s:
            raise ValueError(f"awake_s = {self.awake_s:g} is more than every_s = {self.every_s:g}")
        return self


class LimitsConfig(Section):
    """What a node leaves to others on its machine (docs/duty-cycle.md).

    Attributes:
        cpu_share: part of the time that local steps take; it rests for the other part after each step.
        allow: a command and its arguments; local steps begin only while it exits with 0.
        check_s: from one refusal of that command to the next try.
    """

    cpu_share: Share = 1.0
    allow: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    check_s: Seconds = 30.0


class EvaluationConfig(Section):
    """Evaluation on held-out data, on the server.

    Attributes:
        data: file of rows, or hf:… (docs/tasks.md).
        every: rounds between evaluations.
    """

    data: DataSource
    every: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=1)] = 64


def _room_for_chunks(broker: BrokerConfig, why: str) -> None:
    if broker.max_packet_bytes < CHUNK_PACKET_BYTES:
        raise ValueError(f"broker.max_packet_bytes must be {CHUNK_PACKET_BYTES} or more with {why}")


class ServerConfig(Section):
    """federation.toml.

    Attributes:
        engine: what computes, or "package.module:factory" of one's own (docs/engines.md).
        mask: mask file (`meerkat mask` writes one); not needed where the engine brings its own.
        task: built-in task, or a task's TOML file.
        model: only for evaluation; without it the server never imports torch.
        wait_for_nodes_s: with `once`, how long to wait for min_nodes.
        once: end with the run instead of staying online.
    """

    federation: Identifier
    state_dir: LocalPath
    broker: BrokerConfig = BrokerConfig()
    rounds: RoundsConfig = RoundsConfig()
    guards: GuardsConfig = GuardsConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    values: ServerValuesConfig = ServerValuesConfig()
    engine: EngineName = "transformers"
    toy_weights: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    mask: LocalPath | None = None
    task: str | None = None
    dtype: Dtype = "float32"
    model: ModelConfig | None = None
    evaluation: EvaluationConfig | None = None
    once: Flag = False
    wait_for_nodes_s: Seconds = 120.0

    @model_validator(mode="after")
    def _displacements_fit(self) -> Self:
        if self.values.accept:
            _room_for_chunks(self.broker, "values.accept = true")
        return self


class NodeConfig(Section):
    """node.toml: a node needs only its id, a broker, its data, where the base model is, and a state folder.

    Attributes:
        id: 1 to 64 letters, digits, "_" and "-"; unique in the federation.
        engine: one of one's own, which the run names too; default: the run's, where it is one of this package.
        model: local folder or hub id of the base model; not needed for an engine without one.
        dtype: default: the run's.
        threads: CPU threads for the model; default: torch's own choice.
        uplink: "path": projected gradients; "values": a displacement, of first-order steps.
    """

    id: Identifier
    federation: Identifier
    data: DataSource
    state_dir: LocalPath
    engine: EngineName | None = None
    model: str | None = None
    broker: BrokerConfig = BrokerConfig()
    device: Device = "cpu"
    dtype: Dtype | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    exit_when_finished: Flag = False
    uplink: Literal["path", "values"] = "path"
    values: NodeValuesConfig = NodeValuesConfig()
    schedule: ScheduleConfig | None = None
    limits: LimitsConfig = LimitsConfig()

    @field_validator("broker")
    @classmethod
    def _of_another_process(cls, broker: BrokerConfig) -> BrokerConfig:
        if broker.url == "embedded":
            raise ValueError('url = "embedded" is for servers; give the address of the federation\'s broker')
        return broker

    @model_validator(mode="after")
    def _displacements_fit(self) -> Self:
        if self.uplink == "values":
            _room_for_chunks(self.broker, 'uplink = "values"')
        return self
