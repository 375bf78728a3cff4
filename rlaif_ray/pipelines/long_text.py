"""The guard's one long sample, in which what depends on a token's distance shows: windows, chunks, RoPE's factors."""

from __future__ import annotations

from typing import Any

LONGEST = 320  # tokens: a second or two of a model of 135M parameters on two cores
SHORTEST = 64  # below, the other samples show as much
COMPLETION = 24  # tokens that are compared, all of them far from the beginning
# It does not repeat itself: what a model has read a moment ago it knows by heart, wherever it takes it to stand.
LONG_TEXT = (
    "Before the bridge was built, whoever wished to cross had to wait for Anselm, who kept the ferry and was in "
    "no hurry. He had inherited the boat from an uncle, along with two goats, a debt to the miller, and the habit "
    "of talking to passengers as if they had asked. On market days he told them about the flood that carried off "
    "the church bell; on other days he told them what the bell had weighed. A teacher from the next town once "
    "wrote it all down and found that the bell had grown by half a ton in nine years. Nobody minded. The crossing "
    "took as long as a story, and people who paid with eggs got the long version. Then engineers came with poles "
    "and strings, looked through brass tubes at the far bank, and quarrelled about gravel. They drank everything "
    "the inn had except the plum brandy, which the landlord hid behind the flour. By autumn three stone piers "
    "stood in the current like unfinished teeth. Anselm rowed the workmen out each morning and was paid in coins "
    "for the first time in his life; he kept them in a jar, unsure what else they were good for. When the last "
    "plank was laid, a minister in a tall hat cut a ribbon, the band played twice, and a cart loaded with "
    "pumpkins went over in less time than it takes to sneeze. The ferry lay upside down in the grass that winter. "
    "In spring Anselm painted it green, put a bench inside and a small stove, and opened it as a place to wait, "
    "though there was no longer anything to wait for. It has been full ever since: children go there to be out of "
    "the rain, carters to warm their hands, and the minister, now retired, to hear how much the bell weighed."
)


def long_sample(tokenizer: Any, begin: list[int], room: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Prompt and completion of together as many tokens as `room` and LONGEST allow; None where that is next to none.

    `begin` is what starts every text of the model.
    """
    tokens = [*begin, *tokenizer.encode(LONG_TEXT, add_special_tokens=False)][: min(room, LONGEST)]
    if len(tokens) < SHORTEST:
        return None
    return tuple(tokens[:-COMPLETION]), tuple(tokens[-COMPLETION:])
