"""What a layer on its own mimics of a plan that counts completions alone."""

import makd
from makd.anatomy import resolve
from makd.aspects import activate
from makd.distill.layerwise.targets import inside_layer
from tests.models import tiny


def test_completions_alone_are_all_tokens_for_a_layer_on_its_own():
    anatomy = resolve(tiny("llama", "causal_lm"))
    terms = (
        makd.Term(aspect="hidden", weight=3.0, tokens="completion"),
        makd.Term(aspect="logits", tokens="completion"),
    )
    found = inside_layer(activate(makd.Plan(terms=terms), anatomy), anatomy.layers[0])
    (active,) = found.terms
    assert active.term.weight == 3.0
    assert [comparison.tokens for comparison in active.comparisons] == ["all"]
