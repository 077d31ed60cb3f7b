"""A filter of words: refuses requests with some and masks others in the answer.

Parameters: refuse = ["tiger"], mask = ["paris"]; words, in any case of letters.

The class for the contract's resource `session` is looked for in a module with the name of its interface, `filtering`.
"""

import json
import re

from componentize_py_types import Err
from wit_world import exports
from wit_world.exports.filtering import (
    Channel,
    Passage,
    Refusal,
    Request,
    RequestInfo,
    Verdict,
    Verdict_Pass,
    Verdict_Refuse,
)

# Compiled while the component is built: instances start with what the module made then.
WORD = re.compile(r"\w+")
WORD_AT_THE_END = re.compile(r"\w+\Z")
# A longer run of letters is no word of a list, and must not be held back without end.
WORD_LENGTH_MAX = 100


class Session(exports.filtering.Session):
    """One request and its answer."""

    def __init__(self, refuse: frozenset[str], mask: frozenset[str]) -> None:
        self.refuse = refuse
        self.mask = mask

    @classmethod
    def create(cls, info: RequestInfo) -> "Session":
        params = json.loads(info.params_json)
        unknown = sorted(params.keys() - {"refuse", "mask"})
        if unknown:
            raise Err(f"params: expected refuse and mask, got {', '.join(unknown)}")
        return cls(words(params, "refuse"), words(params, "mask"))

    def on_request(self, request: Request) -> Verdict:
        for message in request.messages:
            for word in WORD.findall(message.content):
                if word.casefold() in self.refuse:
                    return Verdict_Refuse(Refusal(403, f'the word "{word}" is not for this model'))
        return Verdict_Pass()

    def on_text(self, channel: Channel, text: str) -> Passage:
        # The rest of a word may still come: it is masked as a whole or not at all.
        last = WORD_AT_THE_END.search(text)
        held = last is not None and len(last[0]) <= WORD_LENGTH_MAX
        taken = text[: last.start()] if held else text
        return Passage(self.masked(taken), len(taken.encode()))

    def finish(self, channel: Channel, held: str) -> str:
        return self.masked(held)

    def masked(self, text: str) -> str:
        return WORD.sub(lambda word: "*" * len(word[0]) if word[0].casefold() in self.mask else word[0], text)


def words(params: dict, name: str) -> frozenset[str]:
    """A list of words in the parameters, empty if it is left out."""
    listed = params.get(name, [])
    if not isinstance(listed, list) or not all(isinstance(word, str) and WORD.fullmatch(word) for word in listed):
        raise Err(f"params: expected a list of single words as {name}, got {json.dumps(listed)}")
    return frozenset(word.casefold() for word in listed)
