"""transformers' pipelines give of a student what they give of its dense copy: every task of text that a head serves."""

import numpy as np
import pytest
from transformers import pipeline
from transformers.pipelines import SUPPORTED_TASKS

import makd
from makd.student.linear import LowRankLinear
from tests.models import tiny

TEXTS = ["The list binds names of a class.", "An iterator raises an exception before the tuple is compared."]
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}
LABELLED = {"id2label": NLI, "label2id": {label: index for index, label in NLI.items()}}
TASKS = {
    "feature-extraction": ("bert", "base", {}, TEXTS, {}),
    "text-classification": ("bert", "sequence_classification", LABELLED, TEXTS, {"top_k": None}),
    "zero-shot-classification": ("bert", "sequence_classification", LABELLED, TEXTS,
                                 {"candidate_labels": ["a list", "a tuple"]}),
    "token-classification": ("bert", "token_classification", LABELLED, TEXTS, {"aggregation_strategy": "simple"}),
    "fill-mask": ("bert", "masked_lm", {}, [f"[MASK] {text}" for text in TEXTS], {"top_k": 3}),
    "text-generation": ("llama", "causal_lm", {}, TEXTS,
                        {"max_new_tokens": 6, "max_length": None, "do_sample": False, "return_tensors": True}),
}  # fmt: skip
"""Task -> (architecture, head, its config, inputs, arguments of the call)."""
NOT_SERVED = {
    "table-question-answering",  # TAPAS, with a tokenizer of its own
    "text-to-audio",  # no head that makd knows
}


def leaves(output):
    """Everything in nested lists and dictionaries, in their order."""
    if isinstance(output, dict):
        output = list(output.values())
    return [leaf for item in output for leaf in leaves(item)] if isinstance(output, list) else [output]


@pytest.mark.parametrize("task", TASKS)
def test_a_student_and_its_dense_copy_give_the_same(task, tokenizer, tmp_path):
    name, head, config, texts, arguments = TASKS[task]
    teacher = tiny(name, head, vocab_size=300, **config)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.6), solver="svd")
    found = []
    for model, folder in ((student, tmp_path / "student"), (makd.fold(student), tmp_path / "dense")):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        opened = pipeline(task, str(folder), device="cpu")
        assert (model is student) == any(isinstance(module, LowRankLinear) for module in opened.model.modules())
        found.append(leaves(opened(texts, **arguments)))
    assert len(found[0]) >= len(texts)
    assert found[0] == [
        pytest.approx(leaf, abs=1e-4) if isinstance(leaf, float | np.floating) else leaf for leaf in found[1]
    ]


def test_no_task_of_text_is_left_out():
    of_text = {task for task, described in SUPPORTED_TASKS.items() if described["type"] == "text"}
    assert of_text == TASKS.keys() | NOT_SERVED
