"""An export computes what the student computes, in the runtime that it is for, or there is none."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import makd
from makd import exporting
from makd.anatomy import SkippedLayer
from makd.errors import ExportError, OutputError, SettingError, UnknownNameError
from makd.export import ExportConfig, OnnxSession, save_dense, save_onnx, save_program
from makd.export.agreement import compare
from makd.export.shallow import without_skipped
from makd.student.adaptive_embedding import AdaptiveEmbedding
from tests.models import batch, tiny


def make_student(name="bert", head="sequence_classification", **settings):
    return makd.factorize(tiny(name, head), makd.Budget(keep_linears=0.5), solver="svd", **settings)


@pytest.fixture
def folder(tmp_path, tokenizer):
    student = make_student()
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@torch.no_grad()
def test_an_encoder_in_onnx_runtime_gives_the_students_logits_for_any_rows_and_tokens(tmp_path):
    student = make_student()
    save_onnx(student, tmp_path)
    session = OnnxSession(tmp_path / "model.onnx")
    for rows, tokens in ((4, 12), (1, 1), (2, 5)):
        inputs = {name: value[:rows, :tokens] for name, value in batch(student).items()}
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        torch.testing.assert_close(session.run(inputs)["logits"], student(**inputs).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_embeddings_in_bands_are_read_as_torch_reads_them(tmp_path):
    teacher = tiny("bert", vocab_size=640)
    student = makd.factorize(teacher, makd.Budget(keep=0.3), vocabulary="factored", calibration=[batch(teacher)])
    assert isinstance(student.get_input_embeddings(), AdaptiveEmbedding)
    save_onnx(student, tmp_path)
    session = OnnxSession(tmp_path / "model.onnx")
    ids = torch.arange(640).view(20, 32)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    torch.testing.assert_close(session.run(inputs)["last_hidden_state"], student(**inputs)[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_decoder_goes_on_from_keys_and_values_under_the_names_of_optimum(tmp_path):
    student = make_student("mistral", "causal_lm")  # each token sees the last eight
    save_onnx(student, tmp_path)
    session = OnnxSession(tmp_path / "model.onnx")
    assert {"past_key_values.0.key", "past_key_values.1.value"} <= set(session.inputs)
    ids = torch.randint(5, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    expected = student(input_ids=ids).logits
    past = session.empty_past(1)
    for begin, end in ((0, 6), (6, 19), (19, 20)):
        inputs = {
            "input_ids": ids[:, begin:end],
            "attention_mask": torch.ones(1, end, dtype=torch.long),
            "position_ids": torch.arange(begin, end)[None],
        }
        found = session.run(inputs | past)
        torch.testing.assert_close(found["logits"], expected[:, begin:end], atol=1e-4, rtol=0)
        past = {name: found[name.replace("past_key_values", "present")] for name in past}


def test_int8_is_smaller_and_says_how_far_it_is_from_the_student(tmp_path):
    student = make_student()
    (tmp_path / "whole").mkdir(), (tmp_path / "int8").mkdir()
    whole = save_onnx(student, tmp_path / "whole")
    rounded = save_onnx(student, tmp_path / "int8", quantize="int8")
    assert whole.relative_error < 1e-5 < rounded.relative_error < 0.3  # products saturate on CPUs without VNNI


@torch.no_grad()
def test_a_program_runs_in_a_process_that_has_neither_makd_nor_transformers(tmp_path):
    student = make_student()
    save_program(student, tmp_path)
    inputs = batch(student)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch\nfolder = sys.argv[1]\n"
        "run = torch.export.load(folder + '/model.pt2').module()\n"
        "torch.save(run(**torch.load(folder + '/inputs.pt'))['logits'], folder + '/logits.pt')\n"
        "assert 'makd' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), student(**inputs).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_dense_copy_is_no_student_and_says_rotary_positions_as_older_transformers_read_them(tmp_path):
    teacher = tiny("llama", "causal_lm", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")
    save_dense(student, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["rope_theta"], config["torch_dtype"]) == (5000.0, "float32")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "head", "layers"),
    [
        ("bert", "sequence_classification", 3),
        ("llama", "causal_lm", 3),
        ("gpt2", "causal_lm", 3),
        ("gemma3", "causal_lm", 4),
    ],
)
def test_a_dense_copy_has_no_layers_that_its_student_skips(name, head, layers, tmp_path):
    teacher = tiny(name, head, num_hidden_layers=layers)
    student = makd.factorize(
        teacher, makd.Budget(keep_linears=0.5), solver="svd", depth=layers - 1, calibration=[batch(teacher)]
    )
    agreement = save_dense(student, tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert again.config.num_hidden_layers == layers - 1
    assert "quantization_config" not in again.config.to_dict()
    assert agreement.largest_difference < 1e-4
    inputs = batch(student)
    kept = inputs["attention_mask"].bool()
    found, expected = again(**inputs).logits, student(**inputs).logits
    if found.shape[:2] == kept.shape:
        found, expected = found[kept], expected[kept]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_list_that_is_as_long_as_there_are_layers_and_not_of_layers_stays(tmp_path):
    teacher = tiny("llama", "causal_lm", num_hidden_layers=3)
    student = makd.factorize(
        teacher, makd.Budget(keep_linears=0.5), solver="svd", depth=2, calibration=[batch(teacher)]
    )
    student.config.eos_token_id = [3, 4, 5]
    save_dense(student, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [3, 4, 5]


def test_layers_that_another_ones_parts_depend_on_are_not_left_out_in_silence(tmp_path):
    teacher = tiny("bart", "seq2seq_lm")
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")
    student.model.decoder.layers[1] = SkippedLayer.in_place_of(student.model.decoder.layers[1], 0)
    with pytest.raises(ExportError, match="not in one list"):
        without_skipped(student)


def test_an_export_opens_as_what_the_folder_says(folder, tmp_path):
    report = exporting.export(str(folder), ExportConfig(to="dense"), tmp_path / "dense")
    assert report.bytes.keys() == {"model.safetensors"}
    assert json.loads((tmp_path / "dense" / "makd_export.json").read_text())["settings"]["to"] == "dense"
    student = AutoModelForSequenceClassification.from_pretrained(folder)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(again(**batch(again)).logits, student(**batch(student)).logits, atol=1e-4, rtol=0)


def test_only_what_belongs_to_the_model_comes_along(folder, tmp_path):
    (folder / "notes.txt").write_text("mine")
    exporting.export(str(folder), ExportConfig(to="dense"), tmp_path / "dense")
    assert not (tmp_path / "dense" / "notes.txt").exists()
    assert (tmp_path / "dense" / "tokenizer.json").is_file()


def test_a_tokenizer_is_named_as_transformers_before_5_knows_it(folder, tmp_path):
    exporting.export(str(folder), ExportConfig(to="dense"), tmp_path / "dense")
    classes = [
        json.loads((place / "tokenizer_config.json").read_text())["tokenizer_class"]
        for place in (folder, tmp_path / "dense")
    ]
    assert classes == ["TokenizersBackend", "PreTrainedTokenizerFast"]
    again, before = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "dense", folder))
    assert again("a module").input_ids == before("a module").input_ids


def test_a_dense_copy_has_the_numbers_that_its_student_is_stored_in(folder, tmp_path):
    half = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    exporting.export(str(folder), ExportConfig(to="dense"), tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_session_says_which_input_is_missing(tmp_path):
    save_onnx(make_student(), tmp_path)
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(SettingError, match="got no attention_mask"):
        OnnxSession(tmp_path / "model.onnx")(input_ids=ids, token_type_ids=torch.zeros_like(ids))


def test_an_output_that_is_there_stays(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(OutputError):
        exporting.export(str(folder), ExportConfig(to="dense"), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"to": "tflite"}, UnknownNameError),
        ({"to": "onnx", "quantize": "int2"}, UnknownNameError),
        ({"to": "dense", "quantize": "int8"}, SettingError),
        ({"to": "onnx", "tolerance": 0.0}, SettingError),
        ({"to": "gguf"}, SettingError),
        ({"to": "onnx", "llama_cpp": "somewhere"}, SettingError),
        ({"to": "onnx", "gguf_type": "q8_0"}, SettingError),
        ({"to": "gguf", "llama_cpp": "somewhere", "gguf_type": "q1"}, UnknownNameError),
    ],
)
def test_wrong_settings_are_refused_before_any_work(settings, error):
    with pytest.raises(error):
        ExportConfig(**settings)


def test_a_folder_without_the_converter_is_refused(folder, tmp_path):
    with pytest.raises(SettingError, match="convert_hf_to_gguf"):
        exporting.export(str(folder), ExportConfig(to="gguf", llama_cpp=str(tmp_path)), tmp_path / "gguf")


def test_outputs_at_padding_do_not_count_and_others_do():
    mask = torch.tensor([[1, 1, 0]])
    expected = torch.ones(1, 3, 2)
    found = expected.clone()
    found[0, 2] = 9.0
    assert compare([({"logits": found}, {"logits": expected}, mask)]).largest_difference == 0
    found[0, 1, 0] = 1.5
    assert compare([({"logits": found}, {"logits": expected}, mask)]).largest_difference == 0.5


def test_an_output_of_another_shape_is_refused():
    with pytest.raises(ExportError, match="one shape alone"):
        compare([({"logits": torch.ones(1, 2)}, {"logits": torch.ones(3, 2)}, torch.ones(3, 4))])


@pytest.mark.parametrize("save", [save_onnx, save_program])
def test_a_model_that_reads_long_texts_in_another_way_is_refused(save, tmp_path):
    with pytest.raises(ExportError, match="all of texts of at most 28 tokens, and to blocks of longer ones"):
        save(tiny("big_bird"), tmp_path)
    save(tiny("big_bird", attention_type="original_full"), tmp_path)
