"""The README.md of an export: what the model is, which run made it, and how to load it.

Names of models, tasks and federations come from others: `markdown.escaped` shows them as they are.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from meerkat_mq.observe.figures import DASH
from meerkat_mq.observe.markdown import escaped, table
from meerkat_mq.observe.measure import ACCURACY, BESIDE, PERPLEXITY

Kind = Literal["model", "delta", "peft"]  # of an export

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WORDS: Final = {"loss": "loss", **{measure.key: measure.words for measure in (ACCURACY, PERPLEXITY)}, **BESIDE}
_IS: Final = {
    "model": "This folder holds the whole fine-tuned model. Nothing of Meerkat-MQ is needed to load it.",
    "delta": "This folder holds only the weights that were trained. Put them into the base model to get the fine-tuned "
    "model, bit for bit.",
    "peft": "This folder holds an adapter that Hugging Face PEFT adds to the base model.",
}
_LOADING: Final = {
    "model": """from transformers import {loader}

model = {loader}.from_pretrained("FOLDER_OF_THIS_EXPORT")
""",
    "delta": """import torch
from safetensors.torch import load_file
from transformers import {loader}

model = {loader}.from_pretrained("BASE_MODEL")
weights, trained = dict(model.named_parameters()), load_file("FOLDER_OF_THIS_EXPORT/delta.safetensors")
with torch.no_grad():
    for name in {{key.rpartition(".")[0] for key in trained}}:
        flat = weights[name].view(-1)
        flat[trained[f"{{name}}.indices"].long()] = trained[f"{{name}}.values"].to(flat.dtype)
""",
    "peft": """from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained("BASE_MODEL")
model = PeftModel.from_pretrained(base, "FOLDER_OF_THIS_EXPORT")
""",
}


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the ledger says of a run, at the version that is exported.

    Attributes:
        federation, task, engine: names; `task` is "" of a run without one.
        rounds: of the whole run.
        head: hash of the last ledger entry behind the exported theta, hex.
        nodes, rows: how many nodes the ledger knows, and the sum of their rows.
        settings: what the run computed with: name and value.
        before, after: figures of the evaluation before the first round, and of the newest one that is not younger than
            the export; `evaluated` is the version of the latter.
    """

    federation: str
    task: str
    engine: str
    rounds: int
    head: str
    nodes: int
    rows: int
    settings: Mapping[str, str]
    before: Mapping[str, float]
    after: Mapping[str, float]
    evaluated: int | None


@dataclass(frozen=True, slots=True)
class Exported:
    """What is exported.

    Attributes:
        base: as the user named it; of a path, only its last part is shown.
        adapter: folder of the LoRA adapter that was merged into the base before training; "": none.
        fingerprint, mask_hash, run_id, digest: hex; `digest` is that of theta.
        encoder: whether the base is no causal language model.
        mask: which weights were trained, in words.
        version: number of ledger entries behind theta.
        run: what the ledger says; None where it was not beside the difference file.
    """

    base: str
    adapter: str
    fingerprint: str
    mask_hash: str
    run_id: str
    digest: str
    encoder: bool
    mask: str
    version: int
    run: RunFacts | None


def model_card(kind: Kind, found: Exported, said: str = "") -> str:
    """The card as Markdown; `said`: sentences of the export about itself, such as what it does not hold exactly."""
    return "\n".join(_lines(kind, found, said)) + "\n"


def _lines(kind: Kind, found: Exported, said: str) -> Iterator[str]:
    hub = _HUB_ID.fullmatch(found.base) and not Path(found.base).exists()
    base = found.base if hub else Path(found.base).name
    yield from ("---", f"library_name: {'peft' if kind == 'peft' else 'transformers'}", "tags: [meerkat-mq]")
    yield from ([f"base_model: {json.dumps(found.base)}"] if hub else [])
    yield from ("---", "", f"# {escaped(base)}, fine-tuned by Meerkat-MQ", "", _IS[kind])
    yield from ("", escaped(said)) if said else ()
    yield "A federation of nodes trained it. Their data did not leave them; each sent a few numbers a round."
    yield from ("", "## How to load it", "", "```python")
    yield _LOADING[kind].format(loader="AutoModel" if found.encoder else "AutoModelForCausalLM") + "```"
    yield from ("", "## Where it comes from", "", *table(["what", "value"], _origin(found, base)))
    if found.run is None:
        yield from ("", "The ledger of the run was not beside the difference file. So this card does not say the task,")
        yield "the ledger's head and the figures."
        return
    yield from ("", "## Figures on the server's held-out data", "", *_figures(found.run))
    yield from ("", "## Settings", "", *table(["setting", "value"], found.run.settings.items()))
    yield from ("", "`meerkat verify` proves from the run's ledger that theta is what the nodes' updates give.")


def _origin(found: Exported, base: str) -> Iterator[tuple[str, str]]:
    yield "base model", base
    if found.adapter:
        yield "with a LoRA adapter merged into it", found.adapter
    yield "fingerprint of the base's weights (SHA-256)", found.fingerprint
    yield "trained weights", found.mask
    yield "mask hash", found.mask_hash
    yield "run id", found.run_id
    yield "rounds", f"{found.version:,}" + ("" if found.run is None else f" of {found.run.rounds:,}")
    if found.run is not None:
        yield "ledger head", found.run.head or "none: no round has closed"
    yield "digest of theta", found.digest
    if found.run is not None:
        yield "federation", found.run.federation
        yield "task", found.run.task or f"that of the engine {found.run.engine}"
        yield "data", f"{found.run.rows:,} rows on {found.run.nodes:,} nodes, which kept them"


def _figures(run: RunFacts) -> Iterator[str]:
    if not run.before and not run.after:
        yield "The server evaluated nothing."
        return
    names = list(dict.fromkeys((*run.before, *run.after)))
    rows = ([_WORDS.get(name, name), _number(run.before.get(name)), _number(run.after.get(name))] for name in names)
    after = "trained" if run.evaluated is None else f"after {run.evaluated:,} rounds"
    yield from table(["figure", "untrained base", after], rows)


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.4g}"
