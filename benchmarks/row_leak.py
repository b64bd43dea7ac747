"""A server that reads rows: how many tokens of a node's rows does one update give away?

    python -m benchmarks.row_leak                      12 private rows of a tiny Llama with 1,000 tokens
    python -m benchmarks.row_leak --vocabulary 4000    another one

The attack: a mask of one embedding weight a token, which is legal. A projected gradient is ⟨gradient, z⟩, and the
server knows z, so K of them are K equations for the n unknowns of the batch's gradient on the mask. Least squares
solves them. The gradient is zero at each token that the batch does not hold. So the server takes the weights whose size
stands out as the tokens; what every row holds by its template, it knows before. It is told how many there are.

The engine, the mask, the seeds and the local step are the real ones. "refused by" is the key of the node's policy that
ends the attack before it begins. "by chance" is what a guess of as many tokens finds. The last rows of the table have
as many directions as `policy.max_directions` allows of one batch.
"""

import argparse
import random
import tempfile
from pathlib import Path

import numpy as np

from meerkat_mq.config import PolicyConfig
from meerkat_mq.core.directions import direction
from meerkat_mq.core.mask import Mask, MaskedMatrix
from meerkat_mq.core.path import seeds_of
from meerkat_mq.core.step import Row, local_steps
from meerkat_mq.engines.torch.engine import TransformersEngine
from meerkat_mq.engines.torch.load import load_model
from meerkat_mq.runtime.model import Spent
from meerkat_mq.tasks.classification import Classification

EMBEDDING = "model.embed_tokens.weight"
RUN_ID = bytes(range(16))
ROWS, WORDS, EPS = 12, 18, 1e-3
TASK = Classification(
    name="private", fields=("line",), template="{line} It is", label_words=(" a", " b"), text="{line}",
    descriptions=("a", "b"), max_tokens=64,
)  # fmt: skip


def save_model(folder: Path, vocabulary: int) -> Path:
    """A random Llama whose every word is one token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<pad>", "<unk>", "It", "is", "a", "b", *(f"w{i}" for i in range(vocabulary - 8))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=64,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def private_rows(vocabulary: int) -> tuple[list[Row], list[set[int]]]:
    """Rows of random words, and the tokens of each."""
    chance = random.Random(7)
    tokens = [chance.sample(range(8, vocabulary), WORDS) for _ in range(ROWS)]
    rows: list[Row] = [{"line": " ".join(f"w{t - 8}" for t in row), "label": i % 2} for i, row in enumerate(tokens)]
    return rows, [set(row) for row in tokens]


def leaking_mask(engine_of: Path) -> tuple[Mask, TransformersEngine]:
    """One embedding weight a token, and the engine of it."""
    loaded = load_model(engine_of)
    weight = dict(loaded.model.named_parameters())[EMBEDDING].numpy()
    indices = np.arange(0, weight.size, weight.shape[1], dtype=np.uint32)
    zeros = np.zeros(len(indices), np.float32)
    matrix = MaskedMatrix(EMBEDDING, weight.shape, indices, weight.flatten()[indices], zeros)
    mask = Mask((matrix,), loaded.fingerprint, loaded.tokenizer_fingerprint)
    return mask, TransformersEngine(loaded, mask, TASK)


def read(engine: TransformersEngine, mask: Mask, batch: list[Row], directions: int, tokens: set[int], at: int) -> int:
    """How many of a batch's tokens the least squares of one update find."""
    seeds = seeds_of(RUN_ID, at, 0, directions)
    scalars, _ = local_steps(engine, mask.theta_0, seeds, [batch], stream="mk1", eps=EPS, lr=1e-3)
    z = np.stack([direction("mk1", seed, 0, mask.size) for seed in seeds]).astype(np.float64)
    gradient = np.linalg.lstsq(z, np.array(scalars, np.float64), rcond=None)[0]
    gradient[:8] = 0  # of the template and the special tokens
    return len(tokens & set(np.argsort(-np.abs(gradient))[: len(tokens)].tolist()))


def share(
    engine: TransformersEngine, mask: Mask, rows: list[Row], tokens: list[set[int]], batch: int, directions: int
) -> float:
    """Of all tokens of all rows, what one update a batch gives away."""
    found = wanted = 0
    for start in range(0, len(rows) - batch + 1, batch):
        held = set[int]().union(*tokens[start : start + batch])
        found += read(engine, mask, rows[start : start + batch], directions, held, start)
        wanted += len(held)
    return found / wanted


def refused_by(policy: PolicyConfig, batch: int, directions: int) -> str:
    """The key of the node's policy that refuses this attack; "none"."""
    if "embedding" not in policy.kinds:
        return "kinds"
    if min(batch, ROWS) < policy.min_batch:
        return "min_batch"
    each = directions + 1  # and the update's loss
    more = each * min(batch, ROWS) / ROWS
    return "none" if Spent().then("", "run", 2.0 * each, more, policy.max_directions) else "max_directions"


def most_directions(policy: PolicyConfig, batch: int) -> int:
    """Of one batch, that `max_directions` allows."""
    return int(policy.max_directions / (2 + min(1.0, batch / ROWS))) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=1000, help="tokens, and weights of the mask")
    parser.add_argument("--limits", type=int, nargs="*", default=[256, 128, 64, 32], help="of max_directions, to try")
    chosen = parser.parse_args()
    opened = PolicyConfig(kinds=["linear", "embedding"], min_batch=8)
    cases = [(PolicyConfig(), "default", 1, 1000), (PolicyConfig(), "default", 8, 1000), (opened, "opened", 8, 1000)]
    for limit in chosen.limits:
        policy = opened.model_copy(update={"max_directions": limit})
        cases.append((policy, f"opened, max_directions {limit}", 8, most_directions(policy, 8)))
    rows, tokens = private_rows(chosen.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        mask, engine = leaking_mask(save_model(Path(folder), chosen.vocabulary))
        print(
            "| policy | batch | directions | refused by | tokens read, were it not | by chance |\n" + "|---" * 6 + "|"
        )
        for policy, name, batch, directions in cases:
            found = share(engine, mask, rows, tokens, batch, directions)
            guess = min(batch, ROWS) * WORDS / chosen.vocabulary
            refusal = refused_by(policy, batch, directions)
            print(f"| {name} | {batch} | {directions} | {refusal} | {100 * found:.1f} % | {100 * guess:.1f} % |")


if __name__ == "__main__":
    main()
