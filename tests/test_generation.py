"""What a model writes: the same in a batch as row by row, and no state of the model or of torch moves."""

import pytest
import torch
from transformers import GenerationConfig

from makd.errors import DataError
from makd.generation import Sampling, _warn_end, generate, stop_tokens
from tests.data.chats import PLAIN, with_template
from tests.models import tiny

PROMPTS = [[1, 9, 12, 30, 7], [1, 40], [1, 22, 23]]
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


def complete(model, prompts, sampling, seed=0):
    return generate(model, prompts, sampling, stop_tokens(model), 0, seed=seed, batch_size=len(prompts))


@pytest.fixture
def model():
    model = tiny("llama", head="causal_lm")
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    model.config.eos_token_id = None
    return model


def test_rows_of_a_padded_batch_are_what_each_row_would_be_alone(model):
    alone = [complete(model, [prompt], GREEDY)[0] for prompt in PROMPTS]
    assert complete(model, PROMPTS, GREEDY) == alone
    assert all(len(text) == 6 for text in alone)


def test_the_likeliest_token_of_the_whole_text_so_far_comes_next(model):
    ids = list(PROMPTS[0])
    for token in complete(model, [PROMPTS[0]], GREEDY)[0]:
        with torch.no_grad():
            assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


def test_a_text_ends_with_the_first_of_its_models_stops(model):
    whole = complete(model, PROMPTS, GREEDY)
    stop = whole[0][2]
    model.config.eos_token_id = [stop]
    cut = complete(model, PROMPTS, GREEDY)
    assert cut[0] == whole[0][: whole[0].index(stop) + 1]
    assert stop_tokens(model) == [stop]


def test_the_same_seed_writes_the_same_text_and_another_one_another(model):
    sampling = Sampling(max_new_tokens=12)
    assert complete(model, PROMPTS, sampling, (3, 1)) == complete(model, PROMPTS, sampling, (3, 1))
    assert complete(model, PROMPTS, sampling, (3, 1)) != complete(model, PROMPTS, sampling, (1, 3))


def test_sampled_tokens_come_as_often_as_the_model_says(model):
    prompt, temperature = PROMPTS[0], 0.7
    drawn = [
        text[0] for text in complete(model, [prompt] * 4000, Sampling(max_new_tokens=1, temperature=temperature), 5)
    ]
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    found = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double() / len(drawn)
    assert (found - expected).abs().max() < 4 * (0.25 / len(drawn)) ** 0.5  # four standard errors


def test_settings_of_the_models_own_do_not_change_the_text_and_are_there_afterwards(model):
    plain = complete(model, PROMPTS, GREEDY)
    own = GenerationConfig(repetition_penalty=5.0, max_new_tokens=1, pad_token_id=0)
    model.generation_config = own
    model.train()
    assert complete(model, PROMPTS, GREEDY) == plain
    assert model.generation_config is own
    assert model.training


def test_torchs_random_numbers_are_left_alone(model):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    complete(model, PROMPTS, Sampling(max_new_tokens=4), 1)
    assert torch.equal(torch.rand(3), expected)


def test_a_text_ends_where_the_models_positions_do(model):
    limit = model.config.max_position_embeddings
    assert len(complete(model, [[5] * (limit - 2)], GREEDY)[0]) == 2
    with pytest.raises(DataError, match=f"{limit} tokens, and the model reads {limit}"):
        complete(model, [[5] * limit], GREEDY)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(DataError, match="prompt is empty"):
        complete(model, [[5], []], GREEDY)


@pytest.mark.parametrize("name", ["t5", "bart"])
class TestEncoderDecoders:
    @pytest.fixture
    def writer(self, name):
        model = tiny(name, head="seq2seq_lm")
        model.generation_config.eos_token_id = model.config.eos_token_id = None
        return model

    def test_rows_of_a_padded_batch_are_what_each_row_would_be_alone(self, writer):
        alone = [complete(writer, [prompt], GREEDY)[0] for prompt in PROMPTS]
        assert complete(writer, PROMPTS, GREEDY) == alone
        assert all(len(text) == 6 for text in alone)

    def test_the_likeliest_token_after_the_decoders_beginning_comes_next(self, writer):
        read = torch.tensor([PROMPTS[0]])
        written = [writer.config.decoder_start_token_id]
        for token in complete(writer, [PROMPTS[0]], GREEDY)[0]:
            with torch.no_grad():
                found = writer(input_ids=read, decoder_input_ids=torch.tensor([written])).logits[0, -1].argmax()
            assert int(found) == token
            written.append(token)

    def test_a_language_that_the_model_is_told_to_begin_with_comes_first(self, writer):
        writer.generation_config.forced_bos_token_id = 17
        assert complete(writer, [PROMPTS[0]], GREEDY)[0][0] == 17

    def test_the_same_seed_writes_the_same_text_whatever_the_batch(self, writer):
        sampling = Sampling(max_new_tokens=8)
        together = complete(writer, PROMPTS, sampling, (3, 1))
        alone = [
            generate(writer, [prompt], sampling, [], 0, seed=(3, 1), batch_size=1, places=[place])[0]
            for place, prompt in enumerate(PROMPTS)
        ]
        assert together == alone
        assert complete(writer, PROMPTS, sampling, (1, 3)) != together


def test_a_text_ends_where_model_tokenizer_or_chat_template_say_so(model, tokenizer, caplog):
    """[SEP] is the tokenizer's EOS, 7 the model's, [MASK] what the template ends answers with."""
    chatting = with_template(tokenizer, PLAIN.replace("[SEP]", "[MASK]"))
    model.generation_config.eos_token_id = 7
    assert stop_tokens(model, chatting) == sorted([7, tokenizer.eos_token_id, tokenizer.mask_token_id])


def test_an_end_that_only_the_chat_template_knows_is_told_once(model, tokenizer, caplog):
    _warn_end.cache_clear()
    chatting = with_template(tokenizer, PLAIN.replace("[SEP]", "[MASK]"))
    stop_tokens(model, chatting), stop_tokens(model, chatting)
    assert [record.message.count("ends an answer with [MASK]") for record in caplog.records] == [1]
    model.generation_config.eos_token_id = tokenizer.mask_token_id
    _warn_end.cache_clear()
    stop_tokens(model, chatting)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["bart", "pegasus", "prophetnet", "llama", "gpt2", "opt", "bloom"])
def test_what_a_prompt_draws_does_not_depend_on_those_beside_it(name):
    """BART's relatives count positions from the padding on; they would read a padded prompt otherwise."""
    model = tiny(name, head="causal_lm")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 60, (length,), generator=generator).tolist() for length in (3, 9, 5, 5)]
    sampling = Sampling(max_new_tokens=6)
    alone, together = (generate(model, prompts, sampling, [], 0, seed=0, batch_size=size) for size in (1, 4))
    assert alone == together


@pytest.mark.parametrize(("name", "calls"), [("bart", 3), ("llama", 1)])
def test_only_models_that_read_padding_write_after_prompts_of_one_length_at_a_time(name, calls):
    model, done = tiny(name, head="causal_lm"), []
    prompts = [[5, 6], [7, 8], [9], [5, 6, 7]]
    generate(model, prompts, GREEDY, [], 0, seed=0, batch_size=4, on_batch=lambda *told: done.append(told))
    assert len(done) == calls
