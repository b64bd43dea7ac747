"""`meerkat export`: PyTorch is imported only where a model is written."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meerkat_mq.core.path import NO_DIGEST, digest
from meerkat_mq.errors import RunMismatch
from meerkat_mq.extras import importing
from meerkat_mq.ledger.chain import ALTERED
from meerkat_mq.ledger.sqlite import LEDGER_FILE, Ledger
from meerkat_mq.ledger.store import Store
from meerkat_mq.observe.model_card import Exported, Kind, RunFacts, model_card
from meerkat_mq.observe.tables import say
from meerkat_mq.wire.descriptor import RunDescriptor
from meerkat_mq.wire.snapshot import Difference


def export(
    model: Annotated[str, typer.Option(help="Base model of the run: local folder or hub id.")],
    difference: Annotated[Path, typer.Option(help="difference.mkd from the server's state_dir.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet, or be empty.")],
    adapter: Annotated[Path | None, typer.Option(help="Folder of the LoRA adapter that the run's base has.")] = None,
    kind: Annotated[
        Kind,
        typer.Option("--as", help="The whole model; the trained weights alone; or an adapter for Hugging Face PEFT."),
    ] = "model",
) -> None:
    """Write the fine-tuned model as a Hugging Face folder, or what training changed; with a model card."""
    with importing("model", "meerkat export"):
        from meerkat_mq.engines.torch.differences import export_delta, export_peft  # noqa: PLC0415
        from meerkat_mq.engines.torch.export import export_model  # noqa: PLC0415
        from meerkat_mq.engines.torch.folder import find_folder  # noqa: PLC0415
        from meerkat_mq.engines.torch.kinds import bare_model  # noqa: PLC0415
        from meerkat_mq.engines.torch.merge import base_folder  # noqa: PLC0415

    found = Difference.load(difference)
    base = base_folder(model, adapter)
    encoder = bare_model(find_folder(base)).kind == "encoder"
    facts = exported(model, found, difference, encoder=encoder, adapter=adapter)

    def card(said: str) -> str:
        return model_card(kind, facts, said)

    if kind == "model":
        export_model(base, found.mask, found.theta, out, card(""))
    else:
        write = export_delta if kind == "delta" else export_peft
        if said := write(base, found.mask, found.theta, out, card):
            say(Console(), said)
    trained = f"version {found.version} of run {found.run_id.hex()[:8]}, {found.mask.size:,} weights trained"
    say(Console(), f"{out}: {trained}")


def exported(model: str, found: Difference, file: Path, *, encoder: bool, adapter: Path | None = None) -> Exported:
    """What a card says: of the difference in `file`, and of the ledger beside it, where that is the run's.

    Raises:
        LedgerError: the ledger cannot be read.
        RunMismatch: it is the run's, and ends earlier, or has another theta at that version.
    """
    mask = found.mask
    return Exported(
        base=model,
        adapter="" if adapter is None else adapter.resolve().name,
        fingerprint=mask.fingerprint.hex(),
        mask_hash=mask.hash.hex(),
        run_id=found.run_id.hex(),
        digest=digest(found.theta).hex(),
        encoder=encoder,
        mask=f"{mask.size:,} of {mask.covered:,} weights in {len(mask.matrices)} matrices",
        version=found.version,
        run=_run_facts(found, file),
    )


def _run_facts(found: Difference, file: Path) -> RunFacts | None:
    ledger_file = file.parent / LEDGER_FILE
    if not ledger_file.exists():
        return None
    with closing(Ledger.read(ledger_file)) as ledger:
        run = ledger.run
        if run is None or run.run_id != found.run_id:
            return None
        return _at(ledger, run, found, file)


def _at(ledger: Store, run: RunDescriptor, found: Difference, file: Path) -> RunFacts:
    """What the ledger says at the difference's version."""
    version, head = found.version, ""
    if version > ledger.version:
        problem = f"is of version {version}, but the ledger beside it ends at version {ledger.version}"
        raise RunMismatch(str(file), problem, "put back the ledger that belongs to it, or copy the file elsewhere")
    for closed in ledger.closed(version - 1, 1) if version else ():
        head = closed.entry.hash(run.run_id).hex()
        if closed.entry.digest not in (NO_DIGEST, digest(found.theta)):
            problem = f"holds a theta of digest {digest(found.theta).hex()}, version {version} of the ledger another"
            raise RunMismatch(str(file), problem, ALTERED)
    nodes = [row for row in ledger.nodes() if row.slot is not None]
    figures = ledger.metrics()
    evaluated = max((at for at in figures if 0 < at <= version), default=None)
    return RunFacts(
        federation=run.federation,
        task="" if run.task is None else run.task.name,
        engine=run.engine,
        rounds=run.count,
        head=head,
        nodes=len(nodes),
        rows=sum(row.rows or 0 for row in nodes),
        settings={key: str(value) for key, value in run.spec.items() if value is not None},
        before=figures.get(0, {}),
        after=figures[evaluated] if evaluated is not None else {},
        evaluated=evaluated,
    )
