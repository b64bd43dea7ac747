"""The section `[model]` of `federation.toml`."""

from meerkat_mq.config.section import Device, Dtype, LocalPath, Section


class ModelConfig(Section):
    """The base model, where a server has one for evaluation and masks."""

    source: str
    adapter: LocalPath | None = None
    dtype: Dtype = "float32"
    device: Device = "cpu"
