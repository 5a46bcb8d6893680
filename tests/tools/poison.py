"""A loss that is NaN, and so its gradient, wherever a pack holds a trace of certain examples."""

from dataclasses import replace

from redi.training import loop

make_objective = loop.make_objective


def poisoned(*examples: int):
    """What to put in place of `redi.training.loop.make_objective`."""

    def make(*args, **kwargs):
        objective = make_objective(*args, **kwargs)

        def nan(counts, x_TH, w_VH, pack, options):
            out = objective(counts, x_TH, w_VH, pack, options)
            bad = not set(examples).isdisjoint(pack.examples)
            return replace(out, loss=out.loss * float("nan")) if bad else out

        return nan

    return make
