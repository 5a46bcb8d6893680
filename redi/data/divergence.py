"""Where a wrong trace leaves the right one: what comes before is no mistake."""

from dataclasses import replace

import numpy as np

from redi.data.tokenize import Trace


def push_from_divergence(pair: list[Trace], window: int | None = None) -> list[Trace]:
    """(chosen, rejected) with `pushed` of the rejected one set: from its first token that differs
    from the chosen one's, `window` tokens or to the end. Nothing of two equal traces.

    A row that has only a chosen trace stays as it is.
    """
    if len(pair) == 1 and pair[0].is_chosen:
        return pair
    chosen, rejected = pair
    length = min(len(chosen.input_ids), len(rejected.input_ids))
    differ = chosen.input_ids[:length] != rejected.input_ids[:length]
    start = int(np.argmax(differ)) if differ.any() else length
    end = len(rejected.input_ids) if window is None else start + window
    return [chosen, replace(rejected, pushed=(start, end))]
