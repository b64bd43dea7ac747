"""A name in `guards.trusted` that no node has is said, by the log and by `meerkat status`."""

import pytest

from meerkat_mq.config import GuardsConfig
from meerkat_mq.ledger.run import UNSEEN_AFTER, unseen_in_words
from tests.rounds import support
from tests.server.federation import Federation, all_end
from tests.support.command import Meerkat

pytestmark = pytest.mark.timeout(150)

PROBLEM = "guards.trusted names gatway-0, and 10 rounds have not seen such a node: start it, or check the spelling"


@pytest.mark.parametrize("trusted", [["gateway-0"], ["gateway-0", "gatway-0"]])
async def test_a_misspelt_name_is_said(federation: Federation, meerkat: Meerkat, trusted: list[str]) -> None:
    rounds = {"count": UNSEEN_AFTER, "min_nodes": 2, "quorum": 1.0, "deadline_s": 60.0}
    server = federation.server("--once", rounds=rounds, guards={"trusted": trusted})
    nodes = [federation.node(name, exit_when_finished=True) for name in ("gateway-0", "b")]
    assert await all_end(server, *nodes) == [0, 0, 0]
    said = server.said("trusted nodes were not seen")
    status = " ".join(meerkat("status", federation.folder / "server").out.split())
    assert [line["problem"][: len(PROBLEM)] for line in said] == [PROBLEM] * (len(trusted) - 1)
    assert (PROBLEM in status) == (len(trusted) == 2)


def test_it_is_said_after_some_rounds_of_a_run_that_trusts_somebody() -> None:
    trusting, settings = support.settings(guards=GuardsConfig(trusted=("a", "b", "c"))), support.settings()
    assert unseen_in_words(trusting, {"b"}, UNSEEN_AFTER - 1) == ""
    assert unseen_in_words(trusting, {"b"}, 1234).startswith("guards.trusted names a, c, and 1,234 rounds ")
    assert unseen_in_words(trusting, {"a", "b", "c"}, 1234) == unseen_in_words(settings, (), 1234) == ""
