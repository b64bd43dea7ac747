"""Which models have a graph, and how it goes: Llama, Mistral, Qwen2, Qwen3, Gemma-2; BERT.

A family is known by its `model_type`. What a configuration can change beyond what is built here is refused in words.
Whatever is forgotten nevertheless shows: a parameter that the graph does not read is an error, and `bundle` compares
the graph's results with the model's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from onnx import TensorProto

from meerkat_mq.core.directions import Float32Array
from meerkat_mq.engines.onnx.graph import Graph
from meerkat_mq.engines.torch.load import LoadedModel
from meerkat_mq.engines.torch.names import NEEDLESS
from meerkat_mq.errors import UnsupportedModel, shown

MOST_POSITIONS: Final = 8192  # as a task's `max_tokens`

_OTHER = "use a node with PyTorch for this model"
_GATES: Final = {"silu": "silu", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
_ROPES: Final = {"default", "linear", "llama3", "yarn"}  # whose angles do not depend on the length of the input
_DECODERS: Final = {"llama", "mistral", "qwen2", "qwen3", "gemma2"}


@dataclass(frozen=True, slots=True)
class Described:
    """What a node must know of a model beside its graph.

    Attributes:
        embedding, head: names of the tables of embeddings and, of a causal LM, of the output head.
        embed_scale: embeddings are multiplied by it.
        head_cap: logits become cap · tanh(logits ÷ cap); None: they stay.
        positions: tokens of the longest input that the graph computes as the model does.
    """

    embedding: str
    head: str | None
    embed_scale: float
    head_cap: float | None
    positions: int


def describe(loaded: LoadedModel, graph: Graph, blocks: range) -> tuple[Described, str]:
    """Build the graph of some blocks of a model; what a node must know of it, and the name of the graph's output.

    The first blocks begin with embedded tokens, others with the hidden states that those before them give, under the
    same name. The last ones give what the head reads, others the hidden states of all tokens.

    Raises:
        UnsupportedModel: another family, or a configuration that is not built here.
    """
    config = loaded.model.config
    if config.model_type in _DECODERS:
        return _decoder(loaded, graph, blocks)
    if config.model_type == "bert":
        return _bert(loaded, graph, blocks)
    known = ", ".join(sorted(_DECODERS | {"bert"}))
    raise _unsupported(loaded.folder, "model_type", f"{config.model_type} has no graph yet; these have: {known}")


def check_all_read(loaded: LoadedModel, used: set[str]) -> None:
    """Refuse a model of which the graphs, which read these parameters, leave something out."""
    names = {name for name, _ in loaded.model.named_parameters() if not NEEDLESS.search(name)}
    if forgotten := sorted(names - used):
        problem = f"{len(forgotten)} parameters have no place in the graph, such as {forgotten[0]}"
        raise UnsupportedModel(str(loaded.folder), problem, _OTHER)


def _unsupported(folder: Path, key: str, problem: str) -> UnsupportedModel:
    return UnsupportedModel(f"{folder / 'config.json'}: {key}", problem, _OTHER)


def _activation(loaded: LoadedModel, key: str) -> str:
    name = getattr(loaded.model.config, key)
    if name not in _GATES:
        raise _unsupported(loaded.folder, key, f"{shown(name)} has no graph; {', '.join(_GATES)} have")
    return _GATES[name]


def _activated(graph: Graph, x: str, kind: str) -> str:
    return graph.op("Mul", x, graph.op("Sigmoid", x)) if kind == "silu" else graph.op("Gelu", x, approximate=kind)


def _decoder(loaded: LoadedModel, graph: Graph, blocks: range) -> tuple[Described, str]:
    config, model = loaded.model.config, loaded.model.model
    gemma = config.model_type == "gemma2"
    norm, residual = (
        _rms(graph, config.rms_norm_eps, gemma),
        f"model.layers.{{}}.{'pre_feedforward' if gemma else 'post_attention'}_layernorm",
    )
    gate = _activation(loaded, "hidden_activation" if gemma else "hidden_act")
    x = _tokens(graph, config.hidden_size)
    graph.input("position_ids", TensorProto.INT64, ["batch", "length"])
    last = len(model.layers) - 1
    wanted = graph.input("wanted", TensorProto.INT64, ["wanted"]) if last in blocks else ""
    positions = min(loaded.max_tokens, MOST_POSITIONS, _window(config))
    _angles(loaded, graph, positions)
    for number in blocks:
        at, attention = f"model.layers.{number}", model.layers[number].self_attn
        found = _attention(graph, norm(x, f"{at}.input_layernorm"), at, module=attention, config=config)
        if number == last:  # of the last block, only what the head reads
            x, found = graph.op("Gather", x, wanted, axis=0), graph.op("Gather", found, wanted, axis=0)
        found = graph.linear(found, f"{at}.self_attn.o_proj")
        x = graph.op("Add", x, norm(found, f"{at}.post_attention_layernorm") if gemma else found)
        inner = norm(x, residual.format(number))
        up = graph.linear(inner, f"{at}.mlp.up_proj")
        hidden = graph.op("Mul", _activated(graph, graph.linear(inner, f"{at}.mlp.gate_proj"), gate), up)
        found = graph.linear(hidden, f"{at}.mlp.down_proj")
        x = graph.op("Add", x, norm(found, f"{at}.post_feedforward_layernorm") if gemma else found)
    out = norm(x, "model.norm") if last in blocks else x
    head = loaded.model.get_output_embeddings()
    if head.bias is not None:
        raise _unsupported(loaded.folder, "architectures", "its output head has a bias")
    names = {id(parameter): name for name, parameter in loaded.model.named_parameters()}
    embedding, head_name = "model.embed_tokens.weight", names[id(head.weight)]
    graph.used |= {embedding, head_name}
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(model.embed_tokens, "embed_scale", 1.0))
    return Described(embedding, head_name, scale, cap, positions), out


def _window(config: Any) -> int:
    """Tokens that see each other all: of layers with a sliding window, what lies in one."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return MOST_POSITIONS
    return int(window)


def _angles(loaded: LoadedModel, graph: Graph, positions: int) -> None:
    """The rotary embedding's cosines and sines as the model itself makes them, scaling included."""
    config, rotary = loaded.model.config, loaded.model.model.rotary_emb
    kind = getattr(rotary, "rope_type", "default")
    if kind not in _ROPES:
        raise _unsupported(loaded.folder, "rope_parameters", f"positions of type {shown(kind)} have no graph")
    places = torch.arange(positions)[None]
    half = int(rotary.inv_freq.shape[0])
    with torch.inference_mode():
        both = [part[0, :, :half].float().numpy() for part in rotary(torch.zeros(1, dtype=torch.float32), places)]
    for name, values in zip(("cos", "sin"), both, strict=True):
        table = np.ascontiguousarray(values)
        graph.table(f"rotary.{name}", table.shape, lambda table=table: table)  # type: ignore[misc]
    if 2 * half != loaded.model.model.layers[0].self_attn.head_dim or config.hidden_size % 2:
        raise _unsupported(loaded.folder, "rope_parameters", "a part of a head's numbers is rotated only")


def _rms(graph: Graph, epsilon: float, shifted: bool) -> Callable[[str, str], str]:
    def norm(x: str, name: str) -> str:
        weight = graph.vector(f"{name}.weight", _plus_one if shifted else _same)
        return graph.op("RMSNormalization", x, weight, axis=-1, epsilon=epsilon)

    return norm


def _plus_one(values: Float32Array) -> Float32Array:
    return values + np.float32(1)


def _same(values: Float32Array) -> Float32Array:
    return values


def _tokens(graph: Graph, hidden: int) -> str:
    """The input of all tokens, (tokens, hidden), and those that say where they stand in lines of one length."""
    graph.input("spread", TensorProto.INT64, ["batch", "length"])
    graph.input("kept", TensorProto.INT64, ["tokens"])
    return graph.input("embedded", TensorProto.FLOAT, ["tokens", hidden])


def _in_lines(graph: Graph, x: str) -> str:
    """(batch, length, n) of (tokens, n)."""
    return graph.op("Gather", x, "spread", axis=0)


def _no_lines(graph: Graph, x: str, size: int) -> str:
    """(tokens, size) of (batch, length, size)."""
    return graph.op("Gather", graph.op("Reshape", x, graph.dims(-1, size)), "kept", axis=0)


def _attention(graph: Graph, x: str, at: str, *, module: Any, config: Any) -> str:
    """(tokens, heads · size), from x (tokens, hidden)."""
    heads, size = config.num_attention_heads, module.head_dim
    groups = config.num_key_value_heads
    norm = _rms(graph, config.rms_norm_eps, shifted=False)
    rotated = []
    for part, count in (("q", heads), ("k", groups)):
        found = graph.linear(x, f"{at}.self_attn.{part}_proj")
        if graph.has(f"{at}.self_attn.{part}_norm.weight"):
            split = graph.op("Reshape", found, graph.dims(-1, size))
            found = norm(split, f"{at}.self_attn.{part}_norm")
            found = graph.op("Reshape", found, graph.dims(-1, count * size))
        angles = "rotary.cos", "rotary.sin", "position_ids"
        rotated.append(graph.op("RotaryEmbedding", _in_lines(graph, found), *angles, num_heads=count))
    values = _in_lines(graph, graph.linear(x, f"{at}.self_attn.v_proj"))
    settings = {"q_num_heads": heads, "kv_num_heads": groups, "is_causal": 1, "scale": float(module.scaling)}
    if cap := getattr(config, "attn_logit_softcapping", None):
        settings["softcap"] = float(cap)
    found = graph.op("Attention", *rotated, values, **settings)
    return _no_lines(graph, found, heads * size)


def _bert(loaded: LoadedModel, graph: Graph, blocks: range) -> tuple[Described, str]:
    config = loaded.model.config
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise _unsupported(loaded.folder, "position_embedding_type", f"{shown(kind)} has no graph")
    hidden, heads, gate = config.hidden_size, config.num_attention_heads, _activation(loaded, "hidden_act")
    x = _tokens(graph, hidden)
    seen = graph.input("seen", TensorProto.BOOL, ["batch", 1, "length", "length"])

    def norm(x: str, name: str) -> str:
        weight, bias = graph.vector(f"{name}.weight"), graph.vector(f"{name}.bias")
        return graph.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=config.layer_norm_eps)

    if 0 in blocks:
        places = graph.input("places", TensorProto.INT64, ["tokens"])
        x = graph.op("Add", x, graph.op("Gather", _places(loaded, graph), places, axis=0))
        x = norm(x, "embeddings.LayerNorm")
    for number in blocks:
        at = f"encoder.layer.{number}"
        parts = [graph.linear(x, f"{at}.attention.self.{part}") for part in ("query", "key", "value")]
        lined = [_in_lines(graph, part) for part in parts]
        found = graph.op("Attention", *lined, seen, q_num_heads=heads, kv_num_heads=heads)
        found = graph.linear(_no_lines(graph, found, hidden), f"{at}.attention.output.dense")
        x = norm(graph.op("Add", found, x), f"{at}.attention.output.LayerNorm")
        inner = _activated(graph, graph.linear(x, f"{at}.intermediate.dense"), gate)
        x = norm(graph.op("Add", graph.linear(inner, f"{at}.output.dense"), x), f"{at}.output.LayerNorm")
    embedding = "embeddings.word_embeddings.weight"
    graph.used.add(embedding)
    return Described(embedding, None, 1.0, None, min(loaded.max_tokens, MOST_POSITIONS)), x


def _places(loaded: LoadedModel, graph: Graph) -> str:
    """Embeddings of positions, and of the one kind of text that there is, together."""
    table = loaded.model.embeddings.position_embeddings.weight
    kinds = loaded.model.embeddings.token_type_embeddings.weight
    graph.used |= {"embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"}
    return graph.table("positions", tuple(table.shape), lambda: (table + kinds[0]).float().numpy())
