"""What people are told of everything that is counted."""

from typing import Final

_TOLD: Final = "the node was told"
_GUARDS: Final = "the guards kept it out of the model"

MEANINGS: Final = {
    "late": "an update for a round that had closed already; dropped",
    "early": "an update for a round that had not opened yet; dropped",
    "duplicate": "an update that had come before; used once",
    "not asked": "an update of a node that this round had not asked; dropped",
    "of another run": "a message of another run; dropped",
    "of another term": "a message to an earlier server of this run; dropped",
    "refused": f"an update that could not be used; {_TOLD}",
    "refused: resynchronise": f"an update from a node that did not hold the server's weights; {_TOLD} to start over",
    "refused: wrong seeds": f"an update along other directions than those of the round; {_TOLD}",
    "refused: wrong steps": f"an update with another number of local steps than the round asked for; {_TOLD}",
    "refused: out of range": f"an update with numbers that are not finite, or too large to apply; {_TOLD}",
    "refused: no values": f"a displacement, in a run that takes projected gradients only; {_TOLD}",
    "refused: not finite": f"an update with a loss or a projected gradient that is NaN or infinite; {_GUARDS}",
    "refused: too large": f"an update so large that a weight could leave the range of float32; {_GUARDS}",
    "refused: outlier": f"an update far from those of the other nodes and from the node's own past; {_GUARDS}",
    "refused: against": f"an update of a node that has been working against the others; {_GUARDS}",
    "flagged": "a node whose recent updates stand out; `meerkat status` names it",
    "closed at the deadline": "a round that did not wait longer: not all nodes had answered",
    "server started": "a start of a server in this run, or a takeover by another one",
    "died": "a node's connection broke while it was online",
    "left": "a node said goodbye in order",
    "late death": "the end of a connection that had been replaced already; without effect",
    "round extended": "a round's deadline doubled, since too few nodes were heard",
    "no slot left": "a node too many for the round's bitmap; turned away",
    "too many nodes": "a status of a node too many to be remembered; dropped",
    "values missed": "a displacement that did not come in time; dropped",
    "unexpected answer": "a step of the server that came out of turn; ignored",
    "undecodable": "bytes that are no message of this protocol; dropped",
    "misplaced": "a message on a topic where it does not belong; dropped",
    "reply dropped": "an answer that could not be sent; the node asks again",
    "displacement not published": "a displacement that could not be sent to all at once; nodes ask for it",
    "nodes have seen a higher term": "nodes remembered a newer server than the ledger does; a newer term was taken",
    "a term that no server takes": "a message with a term out of range; its term was ignored",
}


def meaning(reason: str) -> str:
    """What a reason means: its own words, else those of its kind, before the colon; "" if it is not known."""
    return MEANINGS.get(reason) or MEANINGS.get(reason.partition(":")[0], "")
