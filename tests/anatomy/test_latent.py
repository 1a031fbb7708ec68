"""Latent attention: queries, keys and values that are made from something narrower."""

import pytest
import torch

import makd
from makd.anatomy import Role, resolve
from makd.errors import UnsupportedModelError
from tests.anatomy.recording import watch
from tests.models import batch, tiny


def merged(heads):
    return heads.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
class TestLatentAttention:
    def test_keys_and_values_are_slices_of_one_linear_head_by_head(self, name):
        model = tiny(name)
        anatomy = resolve(model)
        seen = watch(model, batch(model, padded=False))
        for layer, call in zip(anatomy.layers, seen.attention, strict=True):
            roles = layer.roles
            (output,) = seen.outputs[roles[Role.KEY].module]
            output = output.flatten(1, 2) if output.dim() == 4 else output
            torch.testing.assert_close(merged(call.value), roles[Role.VALUE].part.select(output))
            plain = call.key[..., : model.config.qk_nope_head_dim]  # behind it stands what is rotated
            torch.testing.assert_close(merged(plain), roles[Role.KEY].part.select(output))

    def test_what_reads_the_latents_makes_no_group_with_what_reads_the_states(self, name):
        groups = resolve(tiny(name)).input_groups
        assert not any("kv_b_proj" in linear or "q_b_proj" in linear for group in groups for linear in group)
        latents = [group for group in groups if "kv_a_proj_with_mqa" in group[-1]]
        assert len(latents) == (2 if name == "deepseek_v3" else 0)

    def test_all_linears_of_attention_get_factors_from_text(self, name):
        teacher = tiny(name)
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.9), calibration=[batch(teacher)])
        attention = {linear for linear in resolve(teacher).linears if "self_attn" in linear}
        assert attention <= student.factorization.ranks.keys() | student.factorization.dense.keys()


def test_heads_that_do_not_fit_the_config_are_an_error():
    model = tiny("deepseek_v3")
    model.config.v_head_dim = 6
    with pytest.raises(UnsupportedModelError, match=r"kv_b_proj has 64 .* 8 \+ 6, in 4 groups"):
        resolve(model)
