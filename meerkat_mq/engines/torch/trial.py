"""One small pass before a model is used: what a configuration gets wrong shows there, not at step k."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from meerkat_mq.engines.torch.folder import CONFIG, read_json
from meerkat_mq.engines.torch.in_words import in_words, key_of
from meerkat_mq.engines.torch.kinds import Kind
from meerkat_mq.errors import ModelError, UnsupportedModel

_RESTORE = "restore the model's own config.json, or fetch the model again"


def try_out(model: Any, kind: Kind, ids: list[int], folder: Path, *, finite: bool = True) -> None:
    """Run the model on two short texts that differ in their last token.

    Args:
        model: with its weights.
        kind: what it is held for.
        ids: three or more of the tokenizer's.
        folder: the checkpoint.
        finite: whether its numbers must be.

    Raises:
        ModelError: the pass fails, or gives numbers that are not finite.
        UnsupportedModel: a causal LM that sees later tokens, or a model that needs more than tokens.
    """
    texts = torch.tensor([ids, [*ids[:-1], ids[0]]], device=model.device)
    with in_words(partial(_place, folder / CONFIG), "the model does not run", _RESTORE), torch.inference_mode():
        if kind == "causal":
            out = model(input_ids=texts, use_cache=False).logits.float()
        else:
            out = model(input_ids=texts, attention_mask=torch.ones_like(texts)).last_hidden_state.float()
    if not bool(out.isfinite().all()):
        if not finite:
            return
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(
            str(folder),
            f"gives numbers that are not finite in {dtype}",
            "use bfloat16 or float32; if so already, " + _RESTORE,
        )
    earlier = out[:, :-1]
    if kind == "causal" and not torch.allclose(earlier[0], earlier[1], rtol=1e-2, atol=1e-2 * float(out.std())):
        raise UnsupportedModel(
            f"{folder / CONFIG}: architectures",
            f"{type(model).__name__} sees later tokens, so it is no causal LM",
            "set is_decoder to true, if it was trained as one"
            if hasattr(model.config, "is_decoder")
            else "use a causal LM; of an encoder, one of a family that has encoders only, such as BERT",
        )


def _place(file: Path, said: str) -> str:
    key = key_of(said, read_json(file))
    return f"{file}: {key}" if key else str(file)
