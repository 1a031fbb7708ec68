"""Adapters on factors: merged, they give what they gave before; where they could not, they are refused at once."""

import pytest
import torch
from torch import nn

import makd
from makd.errors import UnsupportedModelError
from tests.models import batch, tiny


class Lora(nn.Module):
    """What peft puts in the place of a linear or an embedding: the layer, and a product of two small matrices."""

    def __init__(self, base_layer: nn.Linear | nn.Embedding) -> None:
        super().__init__()
        rows, columns = base_layer.weight.shape
        self.base_layer = base_layer
        generator = torch.Generator().manual_seed(rows + columns)
        self.down = nn.Parameter(torch.randn(2, columns, generator=generator))
        self.up = nn.Parameter(0.1 * torch.randn(rows, 2, generator=generator))

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if isinstance(self.base_layer, nn.Embedding):
            return self.base_layer(inputs) + self.up[inputs] @ self.down
        return self.base_layer(inputs) + inputs @ self.down.T @ self.up.T

    @torch.no_grad()
    def merge(self) -> nn.Module:
        self.base_layer.weight += self.up @ self.down
        return self.base_layer


def adapt(model, names):
    for name in names:
        model.set_submodule(name, Lora(model.get_submodule(name)))


def merge(model, names):
    for name in names:
        model.set_submodule(name, model.get_submodule(name).merge())


def make_student(name, **settings):
    return makd.factorize(tiny(name, "causal_lm"), makd.Budget(keep_linears=0.5), solver="svd", **settings)


@torch.no_grad()
def logits(model):
    return model(**batch(model)).logits


@pytest.mark.parametrize("settings", [{}, {"share_input": "always"}, {"vocabulary": "factored"}], ids=str)
def test_adapters_on_the_factors_of_linears_are_merged_to_what_they_gave(settings):
    student = make_student("qwen2", **settings)
    before = logits(student)
    names = [name for name, module in student.model.layers.named_modules() if type(module) is nn.Linear]
    names = [f"model.layers.{name}" for name in names if name.endswith(("reduce", "expand"))]
    adapt(student, names)
    adapted = logits(student)
    assert (adapted - before).abs().max() > 0.05
    merge(student, names)
    torch.testing.assert_close(logits(student), adapted, rtol=1e-3, atol=1e-4)


def test_an_adapter_on_a_table_of_untied_embeddings_is_merged_to_what_it_gave():
    student = make_student("llama", vocabulary="factored")
    names = ["model.embed_tokens.table", "lm_head.reduce", "lm_head.expand"]
    adapt(student, names)
    adapted = logits(student)
    merge(student, names)
    torch.testing.assert_close(logits(student), adapted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["transformer.wte.table", "transformer.wte.directions", "lm_head.reduce", "lm_head.expand"]
)
@pytest.mark.parametrize("loaded", [False, True])
def test_an_adapter_on_a_tied_vocabulary_is_refused_in_the_first_forward(name, loaded, tmp_path):
    student = make_student("gpt2", vocabulary="factored")
    if loaded:
        student.save_pretrained(tmp_path)
        student = type(student).from_pretrained(tmp_path)
    adapt(student, [name])
    with pytest.raises(UnsupportedModelError, match="Leave embeddings and LM head out"):
        logits(student)


def test_an_adapter_that_embeddings_do_not_run_is_refused_in_the_first_forward():
    student = make_student("llama", vocabulary="factored")
    adapt(student, ["model.embed_tokens.directions"])
    with pytest.raises(UnsupportedModelError, match="Leave embeddings and LM head out"):
        logits(student)
