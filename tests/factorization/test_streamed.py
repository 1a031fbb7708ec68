"""From files to files: the student of the path in memory, piece by piece, and a killed run goes on where it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import makd
from makd.errors import DataError, ModelLoadError, NumericsError, OutputError, SettingError
from makd.factorization import streamed
from makd.factorization.settings import FactorizeConfig
from makd.factorization.streamed import STREAMABLE, check_streamable, stream_student
from makd.loading import load_empty_model
from tests.models import batch, tiny

BUDGET = makd.Budget(keep_linears=0.5)


def settings(solver="svd", ranks="uniform"):
    return FactorizeConfig(solver=solver, ranks=ranks, rank_multiple=4)


def batches_of(model, count=3):
    return [batch(model, seed=seed) for seed in range(count)]


def stream(teacher, folder, solver="svd", ranks="uniform", dtype=torch.float32, calibration=None, identity=None):
    """Factorize the checkpoint in `teacher` into `folder`/student, with work in `folder`/work."""
    empty, files = load_empty_model(str(teacher), "auto", dtype)
    output = folder / "student"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    batches = batches_of(empty) if calibration is None else calibration
    identity = {"settings": [solver, ranks]} if identity is None else identity
    return stream_student(empty, files, BUDGET, settings(solver, ranks), folder / "work", output, identity, batches)


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny("llama", "causal_lm").save_pretrained(folder)
    return folder


CASES = [
    ("llama", "causal_lm", {}, "svd", "uniform", torch.float32),
    ("llama", "causal_lm", {"tie_word_embeddings": True}, "whitened", "uniform", torch.bfloat16),
    ("llama", "causal_lm", {}, "whitened", "global", torch.float32),
    ("gpt2", "causal_lm", {}, "svd", "energy", torch.float32),  # Conv1D, fused q, k and v, tied
    ("gpt2", "causal_lm", {}, "whitened", "uniform", torch.float32),
    ("phi3", "base", {}, "whitened", "uniform", torch.float32),  # fused by groups
    ("gemma3", "base", {}, "whitened", "uniform", torch.float32),  # scaled embeddings, two kinds of layers
    ("bert", "masked_lm", {}, "whitened", "energy", torch.bfloat16),  # tied head and biases
    ("deberta_v2", "base", {}, "whitened", "uniform", torch.float32),  # layers give tuples
    ("modernbert", "base", {}, "whitened", "uniform", torch.float32),
    ("t5", "base", {}, "svd", "uniform", torch.float16),  # some of it stays in float32
    ("albert", "base", {}, "svd", "uniform", torch.float32),
]


@pytest.mark.parametrize(("name", "head", "changes", "solver", "ranks", "dtype"), CASES)
def test_the_student_is_that_of_the_path_in_memory(name, head, changes, solver, ranks, dtype, tmp_path):
    model = tiny(name, head, **changes)
    model.save_pretrained(tmp_path / "teacher", max_shard_size="20KB")
    assert (tmp_path / "teacher" / "model.safetensors.index.json").is_file()
    teacher = type(model).from_pretrained(tmp_path / "teacher", dtype=dtype)
    calibration = batches_of(model)
    expected = makd.factorize(
        teacher,
        BUDGET,
        solver=solver,
        ranks=ranks,
        calibration=calibration,
        rank_multiple=4,
        share_input="never",
    )
    expected.save_pretrained(tmp_path / "expected")
    report = stream(tmp_path / "teacher", tmp_path, solver, ranks, dtype, calibration)
    assert report.ranks == expected.factorization.ranks
    assert report.dense == expected.factorization.dense
    assert report.parameters == expected.factorization.parameters
    assert report.errors == pytest.approx(expected.factorization.errors, rel=1e-6, abs=1e-9)
    found, wanted = tensors(tmp_path / "student"), tensors(tmp_path / "expected")
    assert found.keys() == wanted.keys()
    for key in found:
        if found[key].is_floating_point():
            torch.testing.assert_close(found[key], wanted[key], msg=lambda text, key=key: f"{key}: {text}")
    for file in (path for path in (tmp_path / "expected").iterdir() if path.suffix == ".json"):
        ours, theirs = (json.loads((tmp_path / folder / file.name).read_text()) for folder in ("student", "expected"))
        for content in (ours, theirs):  # who rounds otherwise in the last bit is another student
            content.get("quantization_config", {}).pop("identity", None)
        assert ours == theirs, file.name
    loaded = type(model).from_pretrained(tmp_path / "student", dtype=dtype)
    assert loaded.config.quantization_config.ranks == report.ranks


def test_shards_are_those_of_save_pretrained(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("makd.factorization.streamed_student.SHARD_SIZE", "20KB")
    stream(llama, tmp_path)
    student = type(tiny("llama", "causal_lm")).from_pretrained(tmp_path / "student")
    student.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("student", "again")]
    assert names[0] == names[1]
    indices = [
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("student", "again")
    ]
    assert indices[0] == indices[1]


@pytest.mark.parametrize("solver", STREAMABLE)
@pytest.mark.parametrize("done", [1, 5, 13])
def test_a_run_that_was_stopped_goes_on_at_the_next_matrix(llama, tmp_path, monkeypatch, solver, done):
    function = f"decompose_{solver}"
    decompose = getattr(streamed, function)
    calls = []

    def counted(*arguments, **named):
        if len(calls) == done and stop:
            raise KeyboardInterrupt
        calls.append(arguments)
        return decompose(*arguments, **named)

    monkeypatch.setattr(streamed, function, counted)
    stop = False
    stream(llama, tmp_path / "whole", solver)
    of = len(calls)
    calls.clear()
    stop = True
    with pytest.raises(KeyboardInterrupt):
        stream(llama, tmp_path / "cut", solver)
    stop = False
    stream(llama, tmp_path / "cut", solver)
    assert len(calls) == of
    one, two = ((tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


def test_layers_that_were_calibrated_are_not_run_again(llama, tmp_path, monkeypatch):
    runs = []
    run = streamed.LayerByLayer.run

    def stop_at_the_second(self, layer, linears):
        if len(runs) == 1:
            runs.append("stopped")
            raise KeyboardInterrupt
        runs.append(layer.index)
        run(self, layer, linears)

    monkeypatch.setattr(streamed.LayerByLayer, "run", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        stream(llama, tmp_path, "whitened")
    stream(llama, tmp_path, "whitened")
    assert runs == [0, "stopped", 1]
    assert not list((tmp_path / "work" / "states").iterdir())
    assert not list((tmp_path / "work" / "statistics").iterdir())


def test_work_of_other_settings_is_not_continued(llama, tmp_path):
    stream(llama, tmp_path, identity={"solver": "svd", "seed": 0})
    with pytest.raises(OutputError, match="its seed is 0, this one's is 1"):
        stream(llama, tmp_path, identity={"solver": "svd", "seed": 1})


def test_a_damaged_note_is_no_traceback(llama, tmp_path):
    stream(llama, tmp_path)
    (tmp_path / "work" / "stream.json").write_text('{"seed"')
    with pytest.raises(OutputError, match=r"stream\.json is damaged"):
        stream(llama, tmp_path)


def test_work_of_something_else_is_not_touched(llama, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="something else"):
        stream(llama, tmp_path)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "precious"


def test_a_solver_that_cannot_stream_is_refused_with_those_that_can():
    with pytest.raises(SettingError, match="These can: svd, whitened"):
        check_streamable(FactorizeConfig(solver="two_sided"))


@pytest.mark.parametrize("name", ["t5", "albert"])
def test_layers_that_do_not_follow_one_another_are_refused(name, tmp_path):
    tiny(name).save_pretrained(tmp_path / "teacher")
    with pytest.raises(SettingError, match="Solver 'svd' can stream it"):
        stream(tmp_path / "teacher", tmp_path, "whitened")


def test_what_works_on_states_between_layers_is_noticed(tmp_path):
    tiny("deberta_v2", conv_kernel_size=3, conv_act="gelu").save_pretrained(tmp_path / "teacher")
    with pytest.raises(SettingError, match="Something besides layers"):
        stream(tmp_path / "teacher", tmp_path, "whitened")


def test_calibration_needs_batches(llama, tmp_path):
    with pytest.raises(DataError, match="at least one batch"):
        stream(llama, tmp_path, "whitened", calibration=[])


def test_a_damaged_weight_is_named_before_any_work(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "broken")
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        stream(tmp_path / "broken", tmp_path)
    assert not list((tmp_path / "work" / "matrices").iterdir())


def test_a_base_models_file_is_read_under_a_head_of_the_same_names(tmp_path):
    tiny("bert", "masked_lm").save_pretrained(tmp_path / "teacher")
    empty, files = load_empty_model(str(tmp_path / "teacher"), "base")
    (tmp_path / "student").mkdir()
    with pytest.raises(ModelLoadError, match="no tensor for pooler"):  # which a masked language model does not have
        stream_student(empty, files, BUDGET, settings(), tmp_path / "work", tmp_path / "student", {})
    tiny("llama", "causal_lm").save_pretrained(tmp_path / "llama")
    empty, files = load_empty_model(str(tmp_path / "llama"), "base")
    stream_student(empty, files, BUDGET, settings(), tmp_path / "work", tmp_path / "student", {})
    assert makd.student.hub.is_student(type(empty).from_pretrained(tmp_path / "student"))


def spoil_index(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def cut_short(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])


def drop_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_a_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "hint"),
    [
        (spoil_index, "names model-00001-of-00002.safetensors, which does not exist"),
        (cut_short, "is not whole"),
        (drop_a_tensor, r"no tensor for model\.layers\.1\.self_attn\.q_proj\.weight"),
        (change_a_shape, "has shape"),
        (only_pickles, r"pytorch_model\.bin and no safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), "not a safetensors file"),
    ],
)
def test_checkpoints_that_cannot_be_streamed(llama, tmp_path, spoil, hint):
    shutil.copytree(llama, tmp_path / "teacher")
    spoil(tmp_path / "teacher")
    with pytest.raises(ModelLoadError, match=hint):
        stream(tmp_path / "teacher", tmp_path)


def test_a_student_and_a_gguf_are_not_teachers(llama, tmp_path):
    stream(llama, tmp_path)
    with pytest.raises(ModelLoadError, match="quantized or factored"):
        load_empty_model(str(tmp_path / "student"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="only safetensors can be streamed"):
        load_empty_model(str(tmp_path / "model.gguf"))
