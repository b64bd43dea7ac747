"""Everything that is counted: one registry of names, each with a sentence for people.

Whatever is worth counting (a message that is dropped, a fault that is survived) is declared here, and counted by its
constant. So a log, a report and `meerkat status` use one name, and none of them shows a figure that nothing explains.
`rounds.events.Count` takes a `Metric` and no other text; tests/core/test_metrics.py looks at all other places.
"""

from typing import Final

METRICS: Final[dict[str, str]] = {}  # the sentence of each name

_TOLD: Final = "the node was told"
_GUARDS: Final = "the guards kept it out of the model"


class Metric(str):
    """The name of something that is counted: of this module's constants, or a kind of one of them."""

    __slots__ = ()

    def of(self, kind: object) -> "Metric":
        """One kind of this, such as "refused: outlier": counted apart, with a sentence of its own or this one's."""
        return Metric(f"{self}: {kind}")


def meaning(name: str) -> str:
    """The sentence of a metric: its own, else that of the one whose kind it is; "" where it is none."""
    return METRICS.get(name) or METRICS.get(name.partition(":")[0], "")


def _metric(name: str, means: str, **kinds: str) -> Metric:
    """Declare a metric, and the sentences of its kinds; in their names, spaces are written as "_"."""
    METRICS[name] = means
    for kind, sentence in kinds.items():
        METRICS[f"{name}: {kind.replace('_', ' ')}"] = sentence
    return Metric(name)


# --- updates ---

LATE: Final = _metric("late", "an update for a round that had closed already; dropped")
EARLY: Final = _metric("early", "an update for a round that had not opened yet; dropped")
DUPLICATE: Final = _metric("duplicate", "an update that had come before; used once")
NOT_ASKED: Final = _metric("not asked", "an update of a node that this round had not asked; dropped")
VALUES_MISSED: Final = _metric("values missed", "a displacement that did not come in time; dropped")
REFUSED: Final = _metric(
    "refused",
    f"an update that could not be used; {_TOLD}",
    resynchronise=f"an update from a node that did not hold the server's weights; {_TOLD} to start over",
    wrong_seeds=f"an update along other directions than those of the round; {_TOLD}",
    wrong_steps=f"an update with another number of local steps than the round asked for; {_TOLD}",
    out_of_range=f"an update with numbers that are not finite, or too large to apply; {_TOLD}",
    no_values=f"a displacement, in a run that takes projected gradients only; {_TOLD}",
    not_finite=f"an update with a loss or a projected gradient that is NaN or infinite; {_GUARDS}",
    too_large=f"an update so large that a weight could leave the range of float32; {_GUARDS}",
    outlier=f"an update far from those of the other nodes and from the node's own past; {_GUARDS}",
    against=f"an update of a node that has been working against the others; {_GUARDS}",
)
FLAGGED: Final = _metric(
    "flagged",
    "a node whose recent updates stand out; `meerkat status` names it",
    over_budget="a node that sent, or asked for, far more than a node needs; it is answered last",
    raises_terms="a node that made the server take one new term after another; it has to wait longer each time",
    silent="a node that missed deadlines; rounds wait for it again when it has answered, at most a tenth of the time",
)
SHORTENED: Final = _metric(
    "displacement shortened",
    "a displacement of which less than half counts: others go less far, or it is one of one or two and not trusted",
)
TOO_FEW_USABLE: Final = _metric(
    "too few updates can be used", "a deadline at which fewer than rounds.min_updates could be used; the round waits"
)
WEIGHS_LESS: Final = _metric(
    "weighs less than its rows", "an update of a node that says it has far more rows than most others have"
)
UNUSABLE: Final = _metric("cannot be used, and the round waits", "a node whose update did not help to close a round")

# --- rounds and servers ---

DEADLINE: Final = _metric("closed at the deadline", "a round that did not wait longer: not all nodes had answered")
EXTENDED: Final = _metric("round extended", "a round's deadline doubled, since too few updates were committed")
STARTED: Final = _metric("server started", "a start of a server in this run, or a takeover by another one")
HIGHER_TERM: Final = _metric(
    "nodes have seen a higher term", "nodes remembered a newer server than the ledger does; a newer term was taken"
)
TERM_KEPT: Final = _metric(
    "a higher term, too soon", "a message with a higher term soon after one that made the server take a new one"
)
IMPOSSIBLE_TERM: Final = _metric(
    "a term that no server takes", "a message with a term out of range; its term was ignored"
)
UNEXPECTED: Final = _metric("unexpected answer", "a step of a server or node that came out of turn; ignored")
EVALUATION_FAILED: Final = _metric("evaluation failed", "an evaluation that the model could not do; it has no figure")
EVALUATION_LEFT_OUT: Final = _metric(
    "evaluation left out", "an evaluation that waited until a newer one was due; it has no figure"
)

# --- nodes come and go ---

DIED: Final = _metric("died", "a node's connection broke while it was online")
LEFT: Final = _metric("left", "a node said goodbye in order")
LATE_DEATH: Final = _metric(
    "late death", "what a node had said before it was online, as an earlier connection ended or as it joined; no effect"
)
NO_SLOT: Final = _metric(
    "no slot left", "a node too many: for a round's bitmap, or of those that never answered a round; turned away"
)
TOO_MANY_NODES: Final = _metric("too many nodes", "a status of a node too many to be remembered; dropped")

# --- messages ---

ANOTHER_RUN: Final = _metric("of another run", "a message of another run; dropped")
ANOTHER_TERM: Final = _metric("of another term", "a message to an earlier server of this run; dropped")
UNDECODABLE: Final = _metric("undecodable", "bytes that are no message of this protocol; dropped")
MISPLACED: Final = _metric("misplaced", "a message on a topic where it does not belong; dropped")
OVER_BUDGET: Final = _metric("over budget", "a message of a node that sends far more than a node needs; dropped")
NOT_ANSWERED: Final = _metric("not answered", "an answer to a node that asks for far more than a node needs; left out")
OUTBOX_FULL: Final = _metric(
    "not published: the outbox is full", "a message that found too many waiting for the broker; the node asks again"
)
OVER_LIMIT: Final = _metric(
    "not published: over broker.max_packet_bytes", "a message that is larger than the broker's packets; dropped"
)
NOT_SENT: Final = _metric(
    "not sent", "a node's message that found too many waiting for the broker, or was too large; it is sent again"
)

# --- a node follows the ledger ---

STALE_SERVER: Final = _metric("stale server", "the state of a server that another one has replaced; ignored")
STALE_TERM: Final = _metric("stale term", "a message of a server that another one has replaced; dropped")
BEYOND_THE_END: Final = _metric("beyond the run's end", "a message of a version that the run never gets to; dropped")
OUTLIVED: Final = _metric(
    "the newest server is silent",
    "ten minutes without a word of the server of the highest term; the node follows another one that speaks",
)
TWO_SERVERS: Final = _metric("two servers in a term", "two servers of one term: the node asked for a higher one")
OLD_ROUND: Final = _metric("old round", "a round that was older than the newest one; ignored")
ENTRY_REFUSED: Final = _metric("entry refused", "a ledger entry that did not extend the node's own ledger; refused")
RESYNCHRONISED: Final = _metric("resynchronised", "a node that began again at the first version, to follow the ledger")
DIGEST_DIFFERS: Final = _metric("digest differs", "other weights than the ledger's after an entry; the node began anew")
ENTRIES_MISSED: Final = _metric("entries missed", "entries that could not be applied yet; the node asked again")
SNAPSHOT_MISSED: Final = _metric("snapshot missed", "a snapshot that did not come whole; the node asked again")
STEPS_FAILED: Final = _metric(
    "steps failed", "local steps that the model could not do, or the node's policy does not allow; it tries again later"
)
REFUSES: Final = _metric(
    "refuses the run",
    "a node that takes no part, by its own policy or because it cannot; its status says why",
)
NOISY: Final = _metric(
    "projected gradients are noise",
    "a node whose projected gradients are mostly rounding; `meerkat status` names it",
)
CANNOT_TAKE_PART: Final = _metric(
    "cannot take part",
    "a node whose model, rows or weights do not fit the run; it leaves the run, and tries again later",
)
LATE_STEP: Final = _metric("late step", "local steps that were done when no round could take them any more")
