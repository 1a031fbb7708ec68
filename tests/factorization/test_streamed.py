"""From files to files: the student of the path in memory, piece by piece, and a killed run goes on where it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import makd
from makd.calibration.store import DiskStore
from makd.errors import DataError, ModelLoadError, NumericsError, OutputError, SettingError
from makd.factorization import student_files
from makd.factorization.factorize import make_student
from makd.factorization.settings import FactorizeConfig
from makd.factorization.streamed import check_streamable, stream_student
from makd.factorization.work import Work
from makd.loading import load_empty_model
from makd.weights.on_disk import Checkpoint
from tests.models import batch, tiny

BUDGET = makd.Budget(keep_linears=0.5)


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    """Runs are stopped here, not machines."""
    monkeypatch.setattr("os.fsync", lambda _descriptor: None)


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
    work = Work(folder / "work", lambda: identity)
    student, student.factorization = stream_student(
        empty, files, BUDGET, settings(solver, ranks), work, output, batches
    )
    return student


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny("llama", "causal_lm").save_pretrained(folder)
    return folder


CASES = [
    ("llama", "causal_lm", {}, "auto", "auto", torch.float32),
    ("llama", "causal_lm", {"tie_word_embeddings": True}, "auto", "auto", torch.bfloat16),
    ("llama", "causal_lm", {}, "whitened", "global", torch.float32),
    ("llama", "causal_lm", {}, "regression", "uniform", torch.float32),
    ("gpt2", "causal_lm", {}, "svd", "energy", torch.float32),  # Conv1D, fused q, k and v, tied
    ("gpt2", "causal_lm", {}, "auto", "auto", torch.float32),
    ("phi3", "base", {}, "whitened", "uniform", torch.float32),  # fused by groups
    ("gemma3", "base", {}, "auto", "auto", torch.float32),  # scaled embeddings, two kinds of layers
    ("bert", "masked_lm", {}, "fisher", "energy", torch.bfloat16),  # tied head and biases
    ("bert", "base", {}, "auto", "auto", torch.float32),
    ("deberta_v2", "base", {}, "auto", "auto", torch.float32),  # layers give tuples
    ("modernbert", "base", {}, "two_sided", "uniform", torch.float32),
    ("t5", "base", {}, "svd", "uniform", torch.float16),  # some of it stays in float32
    ("albert", "base", {}, "svd", "uniform", torch.float32),
]


@pytest.mark.parametrize(("name", "head", "changes", "solver", "ranks", "dtype"), CASES)
def test_the_student_is_that_of_the_path_in_memory_bit_for_bit(name, head, changes, solver, ranks, dtype, tmp_path):
    model = tiny(name, head, **changes)
    model.save_pretrained(tmp_path / "teacher", max_shard_size="20KB")
    assert (tmp_path / "teacher" / "model.safetensors.index.json").is_file()
    teacher = type(model).from_pretrained(tmp_path / "teacher", dtype=dtype)
    calibration = batches_of(model)
    expected = makd.factorize(teacher, BUDGET, solver=solver, ranks=ranks, calibration=calibration, rank_multiple=4)
    expected.save_pretrained(tmp_path / "expected")
    report = stream(tmp_path / "teacher", tmp_path, solver, ranks, dtype, calibration).factorization
    theirs = expected.factorization
    for field in ("ranks", "dense", "errors", "fallbacks", "parameters", "shared_inputs"):
        assert getattr(report, field) == getattr(theirs, field), field
    found, wanted = tensors(tmp_path / "student"), tensors(tmp_path / "expected")
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    for file in (path for path in (tmp_path / "expected").iterdir() if path.suffix == ".json"):
        assert json.loads((tmp_path / "student" / file.name).read_text()) == json.loads(file.read_text()), file.name
    loaded = type(model).from_pretrained(tmp_path / "student", dtype=dtype)
    assert loaded.config.quantization_config.ranks == report.ranks


@pytest.mark.parametrize("solver", ["svd", "two_sided", "two_sided_regression"])
def test_a_shared_a_is_streamed_too(llama, tmp_path, solver):
    chosen = FactorizeConfig(solver=solver, rank_multiple=4, share_input="always")
    empty, files = load_empty_model(str(llama), "auto", torch.float32)
    teacher, calibration = type(empty).from_pretrained(llama), batches_of(empty)
    expected = makd.factorize(
        teacher, BUDGET, solver=solver, calibration=calibration, rank_multiple=4, share_input="always"
    )
    expected.save_pretrained(tmp_path / "expected")
    (tmp_path / "student").mkdir()
    _, report = stream_student(empty, files, BUDGET, chosen, Work(tmp_path / "work"), tmp_path / "student", calibration)
    assert any(found.shared for found in report.shared_inputs)
    found, wanted = tensors(tmp_path / "student"), tensors(tmp_path / "expected")
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def test_shards_are_those_of_save_pretrained(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("makd.factorization.student_files.SHARD_SIZE", "20KB")
    stream(llama, tmp_path)
    student = type(tiny("llama", "causal_lm")).from_pretrained(tmp_path / "student")
    student.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("student", "again")]
    assert names[0] == names[1]
    indices = [
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("student", "again")
    ]
    assert indices[0] == indices[1]


STEPS = {
    "enter": "teacher/0000/00001",
    "up": "teacher/0002/00001",
    "turn": "gradients/0002/00001",
    "down": "gradients/0001/00001",
    "decompose": "spectra/model.layers.1.self_attn.o_proj",
    "gram": "gram/model.layers.0.mlp.up_proj",
    "fit": "learned/0001",
    "states": "student/0001/00001",
    "told": "made/0000",
    "mark": "done/student/0001",
}
"""Entry of the store, by the step that writes it."""


def stop_at(monkeypatch, entry, times=1):
    """Let the store raise KeyboardInterrupt in the place of writing `entry`, and list what it writes before that."""
    write, written = DiskStore.write, []

    def stopping(self, name, *arguments):
        nonlocal times
        if name == entry and times:
            times -= 1
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, *arguments)

    monkeypatch.setattr(DiskStore, "write", stopping)
    return written


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """The bytes of the default solver's student, made in one go, and what is written to the store on the way."""
    folder, written = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        written = stop_at(patch, "")
        stream(llama, folder, "auto", "auto")
    return (folder / "student" / "model.safetensors").read_bytes(), written


@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_was_stopped_gives_the_same_bytes_and_does_no_layer_again(llama, whole, tmp_path, monkeypatch, step):
    expected, of = whole
    assert STEPS[step] in of, "a step that there is"
    written = stop_at(monkeypatch, STEPS[step])
    with pytest.raises(KeyboardInterrupt):
        stream(llama, tmp_path, "auto", "auto")
    before = list(written)
    written.clear()
    stream(llama, tmp_path, "auto", "auto")
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == expected
    marked = {name.removeprefix("done/") for name in before if name.startswith("done/")}
    again = {name.rpartition("/")[0] for name in written}
    assert not marked & (again - {"teacher/0000"}), "states of a step that was done are made again"


def test_a_run_that_is_stopped_while_shards_are_written_only_writes_them(llama, whole, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(student_files, "write_tensors", stopped)
        with pytest.raises(KeyboardInterrupt):
            stream(llama, tmp_path, "auto", "auto")
    written = stop_at(monkeypatch, "")
    stream(llama, tmp_path, "auto", "auto")
    assert {name.partition("/")[0] for name in written} <= {"teacher", "done"}
    assert all(name.startswith(("teacher/0000", "done/teacher/0000")) for name in written)
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == whole[0]


@pytest.mark.parametrize("solver", ["svd", "fisher", "whitened", "two_sided", "regression"])
def test_runs_of_every_solver_go_on_where_they_were(llama, tmp_path, monkeypatch, solver):
    stream(llama, tmp_path / "whole", solver)
    last = "spectra/model.layers.0.mlp.gate_proj" if solver in ("fisher", "two_sided") else "learned/0001"
    last = "factors/model.layers.1.mlp.gate_proj" if solver in ("svd", "whitened") else last
    stop_at(monkeypatch, last)
    with pytest.raises(KeyboardInterrupt):
        stream(llama, tmp_path / "cut", solver)
    stream(llama, tmp_path / "cut", solver)
    one, two = ((tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


@pytest.mark.parametrize("solver", ["svd", "whitened", "auto"])
def test_one_layers_weights_are_real_at_a_time(llama, tmp_path, monkeypatch, solver):
    read, sizes = Checkpoint.read, []

    def counted(self, name):
        real = {id(p): p.numel() for p in self.model.parameters() if not p.is_meta}
        sizes.append(sum(real.values()))
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    stream(llama, tmp_path, solver)
    model = tiny("llama", "causal_lm")
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    head = model.lm_head.weight.numel() + model.model.norm.weight.numel()
    rows = model.get_input_embeddings().weight.numel()
    assert 0 < max(sizes) <= largest + head + rows < 2 * largest


def test_work_of_other_settings_is_not_continued(llama, tmp_path):
    stream(llama, tmp_path, identity={"solver": "svd", "seed": 0})
    with pytest.raises(OutputError, match="its seed is 0, this one's is 1"):
        stream(llama, tmp_path, identity={"solver": "svd", "seed": 1})


def test_a_damaged_note_is_no_traceback(llama, tmp_path):
    stream(llama, tmp_path)
    (tmp_path / "work" / "work.json").write_text('{"seed"')
    with pytest.raises(OutputError, match=r"work\.json is damaged"):
        stream(llama, tmp_path)


def test_work_of_something_else_is_not_touched(llama, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="something else"):
        stream(llama, tmp_path)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"vocabulary": "factored"}, "Factored vocabularies and dropped layers cannot be streamed"),
        ({"depth": 1}, "depth 1"),
        ({"store": "memory"}, "leave factorize.store at auto"),
    ],
)
def test_settings_that_cannot_be_streamed_are_refused(changes, hint):
    with pytest.raises(SettingError, match=hint):
        check_streamable(FactorizeConfig(**changes))


@pytest.mark.parametrize("name", ["t5", "albert"])
def test_layers_that_do_not_follow_one_another_are_refused(name, tmp_path):
    tiny(name).save_pretrained(tmp_path / "teacher")
    with pytest.raises(SettingError, match=r"two stacks or shared layers\. Take solver 'svd'"):
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
    assert not list((tmp_path / "work").rglob("spectra"))


def test_a_base_models_file_is_read_under_a_head_of_the_same_names(tmp_path):
    tiny("bert", "masked_lm").save_pretrained(tmp_path / "teacher")
    empty, files = load_empty_model(str(tmp_path / "teacher"), "base")
    (tmp_path / "student").mkdir()
    with pytest.raises(ModelLoadError, match="no tensor for pooler"):  # which a masked language model does not have
        stream_student(empty, files, BUDGET, settings(), Work(tmp_path / "work"), tmp_path / "student")
    tiny("llama", "causal_lm").save_pretrained(tmp_path / "llama")
    empty, files = load_empty_model(str(tmp_path / "llama"), "base")
    stream_student(empty, files, BUDGET, settings(), Work(tmp_path / "work"), tmp_path / "student")
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


@pytest.mark.parametrize("solver", ["whitened", "auto"])
def test_buffers_that_are_stored_say_where_tokens_go(solver, tmp_path):
    teacher = tiny("deepseek_v3", "causal_lm", num_experts_per_tok=1, n_group=1, topk_group=1)
    biases = {name: buffer for name, buffer in teacher.named_buffers() if "correction_bias" in name}
    assert biases
    for buffer in biases.values():
        buffer.copy_(torch.linspace(3.0, -3.0, len(buffer)))
    teacher.save_pretrained(tmp_path / "teacher", save_original_format=False)
    empty, files = load_empty_model(str(tmp_path / "teacher"), "causal_lm")
    output, batches = tmp_path / "student", [batch(teacher, seed=seed) for seed in range(4)]
    output.mkdir()
    budget = makd.Budget(keep_linears=0.8)
    stream_student(empty, files, budget, FactorizeConfig(solver=solver), Work(tmp_path / "work"), output, batches)
    expected, _ = make_student(teacher, budget, FactorizeConfig(solver=solver, experts="dense"), batches)
    found = type(teacher).from_pretrained(output)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, msg=name)
