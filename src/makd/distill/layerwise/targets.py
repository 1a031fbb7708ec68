"""Station 7: what a layer that is taught on its own mimics, of a plan for whole models."""

from dataclasses import replace

from makd.anatomy import Layer
from makd.aspects import ActivePlan, ActiveTerm, Comparison, Term
from makd.capture import Tap

OUTPUT = "output"
"""What the loss of a layer's output is called where the plan itself does not compare it."""


def inside_layer(plan: ActivePlan, layer: Layer) -> ActivePlan:
    """The part of `plan` that needs no other layer than `layer`, and always the layer's output.

    Terms of hidden states, matrices, attention and relations stay where they compare this layer with the same one of
    the teacher, each a mean over what it compares here. Predictions, embeddings and tasks ask for all layers, and a
    comparison with another layer of the teacher for its states: they are left out. What counts completions alone
    counts all tokens here: later layers read from every one of them, and a layer is not told of labels. The next layer
    reads this one's output at every token, so that a plan which leaves the output out here (`every:2`, `first` tokens,
    no term `hidden`) gets it all the same, with the weight of its term `hidden`, or 1.
    """
    found = []
    for active in plan.terms:
        here = tuple(
            replace(one, tokens="all") if one.tokens == "completion" else one
            for one in active.comparisons
            if one.tap.layer == one.teacher.layer == layer.index
        )
        if here:
            found.append(replace(active, comparisons=here))
    output = Tap(layer.index, "hidden")
    if not any(one.tap == output and one.tokens == "all" for active in found for one in active.comparisons):
        weight = next((active.term.weight for active in plan.terms if active.term.aspect == "hidden"), 1.0)
        term = Term(aspect="hidden", weight=weight)
        found.append(ActiveTerm(OUTPUT, term, (Comparison(output, output, "mse"),)))
    return ActivePlan(tuple(found))
