"""What the machines are told, and what they ask for.

Events carry `now`, seconds on whatever clock drives the machine. Effects are carried out in order by a driver:
runtime/, in a service or in memory.
"""

# isort: off
from meerkat_mq.rounds.events.common import Count, End, Tick
from meerkat_mq.rounds.events.node import (
    ApplyEntries, Connected, EntriesApplied, EntriesMissed, FetchSnapshot, Forget, FrameCame, NodeEffect, NodeEvent,
    PublishStatus, ResetTheta, Send, ServerCame, SnapshotLoaded, SnapshotMissed, StartSteps, StepsDone, StepsFailed,
    StopSteps,
)  # fmt: skip
from meerkat_mq.rounds.events.server import (
    ApplyTerms, CommitEntry, CommitSlot, CommitUpdate, DirectionsMeasured, EntryCommitted, FetchValues, JudgeRound,
    KeepSnapshot, MeasureDirections, PublishRound, PublishState, Reply, RoundJudged, SendChunks, SendEntries,
    ServerAnswer, ServerEffect, ServerEvent, ServerSeen, SlotCommitted, StatusCame, TakeTerm, TermsApplied, UpdateCame,
    UpdatesCommitted, ValuesCame, ValuesMissed, WantCame,
)  # fmt: skip

__all__ = [
    "ApplyEntries", "ApplyTerms", "CommitEntry", "CommitSlot", "CommitUpdate", "Connected", "Count",
    "DirectionsMeasured", "End", "EntriesApplied", "EntriesMissed", "EntryCommitted", "FetchSnapshot", "FetchValues",
    "Forget", "FrameCame", "JudgeRound", "KeepSnapshot", "MeasureDirections", "NodeEffect", "NodeEvent", "PublishRound",
    "PublishState", "PublishStatus", "Reply", "ResetTheta", "RoundJudged", "Send", "SendChunks", "SendEntries",
    "ServerAnswer", "ServerCame", "ServerEffect", "ServerEvent", "ServerSeen", "SlotCommitted", "SnapshotLoaded",
    "SnapshotMissed", "StartSteps", "StatusCame", "StepsDone", "StepsFailed", "StopSteps", "TakeTerm", "TermsApplied",
    "Tick", "UpdateCame", "UpdatesCommitted", "ValuesCame", "ValuesMissed", "WantCame",
]  # fmt: skip
