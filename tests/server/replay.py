"""What a run of toy nodes must come to: theta walked from the rules alone, and what can be checked of any ledger."""

from collections.abc import Mapping
from functools import partial

from meerkat_mq.core.path import Coefficient, apply_terms, coefficient, digest, seed_for
from meerkat_mq.core.step import local_steps
from meerkat_mq.engines.toy import QuadraticEngine, toy_mask
from meerkat_mq.ledger.sqlite import Ledger
from meerkat_mq.ledger.verify import verify_ledger
from meerkat_mq.rounds.clipping import clipped


def undisturbed(ledger: Ledger, seeds: Mapping[str, int]) -> bytes:
    """The digest at the end of the ledger's run, had all its nodes answered every round and nothing gone wrong."""
    run, slots = ledger.run, ledger.slots()
    assert run is not None
    assert slots.keys() == seeds.keys()
    clips = ledger.rules["rounds"]["aggregate"] == "clipped-mean"
    theta, engine = toy_mask(run.weights).theta_0, QuadraticEngine(run.weights)
    for version in range(run.count):
        heard = {}
        for node, slot in slots.items():
            lane = slot % run.directions
            walk = [seed_for(run.run_id, version, lane, step) for step in range(run.local_steps)]
            batches = [[{"seed": seeds[node]}] * run.batch_size] * run.local_steps
            scalars, _ = local_steps(engine, theta, walk, batches, stream=run.stream, eps=run.eps, lr=run.lr)
            heard[slot] = (lane, scalars)
        terms = []
        for lane in range(run.directions):
            for step in range(run.local_steps):
                of_lane = [scalars[step] for its_lane, scalars in heard.values() if its_lane == lane]
                if clips:
                    of_lane = clipped(of_lane, [scalars[step] for _, scalars in heard.values()])
                c = coefficient(run.lr, [(1, scalar) for scalar in of_lane], len(heard))
                terms += [Coefficient(lane, step, c)] if c else []
        apply_terms(theta, terms, partial(_seed, run.run_id, version), run.stream)
    return digest(theta)


def _seed(run_id: bytes, version: int, term: Coefficient) -> int:
    return seed_for(run_id, version, term.lane, term.step)


def verified(ledger: Ledger) -> bytes:
    """The digest of theta as the ledger says, every entry checked."""
    run = ledger.run
    assert run is not None
    return verify_ledger(ledger, toy_mask(run.weights)).digest
