"""A user's own package adds a solver, an aspect and an anatomy: `examples/extension`, as if pip had installed it."""

import json
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, TrainingArguments

import makd
from makd import extensions, pipeline
from makd.anatomy import ANATOMIES, Family, resolve
from makd.aspects import ASPECTS, Aspect, Plan, own_loss
from makd.baselines import BASELINES
from makd.comparison.cells import all_cells, cell_hash, latency_hash, teacher_hash
from makd.errors import ExtensionError, OutputError, SettingError, UnknownNameError
from makd.provenance import TABLES as SETTINGS
from makd.provenance import anatomy_of, extensions_of
from makd.solvers import SOLVERS, Decomposition, Solver, decompose_svd
from tests.models import batch, tiny
from tests.processes.starting import begin, end

PACKAGE = Path(__file__).parents[1] / "examples" / "extension"
TEXTS = [f"The {what} of a model that reads this line." for what in ("name", "size", "depth", "width")] * 12
TABLES = (SOLVERS, ASPECTS, ANATOMIES)


def install(folder, monkeypatch, version="1.0", name="makd-example", entries=None, modules=PACKAGE / "src"):
    """Put a package into `folder` as pip does: its modules, and what its entry points are."""
    shutil.copytree(modules, folder, dirs_exist_ok=True)
    project = (PACKAGE / "pyproject.toml").read_text(encoding="utf-8")
    if entries is None:
        parts = project.split('[project.entry-points."')[1:]
        entries = "".join(f"[{part.split(chr(34))[0]}]\n{part.split(']', 1)[1].split('[')[0]}\n" for part in parts)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entries.replace('"', ""))
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Tables forget what a test added."""
    for table in TABLES:
        for store in ("_items", "_origins"):
            monkeypatch.setattr(table, store, dict(getattr(table, store)))
    monkeypatch.setattr(extensions, "_loaded", {})
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("makd_example", "broken_example")]:
        del sys.modules[name]


@pytest.fixture
def package(tmp_path, monkeypatch):
    install(tmp_path / "site-packages", monkeypatch)
    return tmp_path / "site-packages"


@pytest.fixture(scope="session")
def teacher_class():
    """The package's model class: transformers knows one of a name, for as long as the process lives."""
    sys.path.insert(0, str(PACKAGE / "src"))
    try:
        from makd_example.anatomy import TwostrokeConfig, TwostrokeModel
    finally:
        sys.path.remove(str(PACKAGE / "src"))
    return TwostrokeModel, TwostrokeConfig


def calibration():
    return [batch(tiny("bert"))]


def recipe(**settings):
    return makd.Recipe(
        plan=makd.Plan(terms=(makd.Term(aspect="lengths"), makd.Term(aspect="hidden"))),
        factorize=makd.FactorizeConfig(solver="scaled_svd"),
        training=makd.TrainingConfig(**{"steps": 4, "batch_size": 4, **settings}),
        evaluation=makd.EvaluationConfig(latency=False),
    )


@pytest.mark.usefixtures("package")
def test_a_solver_of_an_installed_package_makes_the_student_that_its_formula_gives():
    teacher, text = tiny("bert"), calibration()
    student = makd.factorize(
        teacher, makd.Budget(keep_linears=0.5), solver="scaled_svd", calibration=text, share_input="never"
    )
    name = "encoder.layer.0.attention.self.query"
    seen = []
    with torch.no_grad():
        hook = teacher.get_submodule(name).register_forward_hook(lambda module, given, out: seen.append(given[0]))
        teacher(**text[0])
        hook.remove()
    rows = seen[0][text[0]["attention_mask"].bool()].double()
    size, weight = rows.square().mean(0).sqrt(), teacher.get_submodule(name).weight.double()
    left, values, right = torch.linalg.svd(weight * size, full_matrices=False)
    rank = student.factorization.ranks[name]
    expected = (left[:, :rank] * values[:rank]) @ right[:rank] / size
    torch.testing.assert_close(student.get_submodule(name).dense_weight().double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("package")
def test_flags_and_yaml_know_the_names_and_the_run_says_whose_they_are(run, encoder_folder, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "recipe.yaml").write_text(
        "recipe:\n  plan: {terms: [{aspect: lengths, layers: last}]}\n  training: {steps: 2, batch_size: 4}\n"
    )
    code, _, err = run(
        "compress", "--data.max_length", "32", "--config", tmp_path / "recipe.yaml", "--teacher", encoder_folder,
        "--data.path", tmp_path / "texts.txt", "--budget.keep_linears", "0.5",
        "--recipe.factorize.solver", "scaled_svd", "--recipe.evaluation.latency", "false",
        "--output", tmp_path / "student",
    )  # fmt: skip
    assert code == 0, err
    environment = json.loads((tmp_path / "student" / "environment.json").read_text())
    assert set(environment["extensions"]) == {"aspect 'lengths'", "solver 'scaled_svd'"}
    assert environment["extensions"]["solver 'scaled_svd'"].startswith("makd-example 1.0 (")


def test_a_student_of_a_users_solver_and_aspect_loads_where_the_package_is_not(encoder_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as here:
        install(tmp_path / "site-packages", here)
        made = makd.compress(str(encoder_folder), TEXTS, makd.Budget(keep_linears=0.5), recipe(), tmp_path / "student")
    for table in TABLES:
        for name in set(table._items).difference(table.own):
            del table._items[name]
    assert "scaled_svd" not in SOLVERS
    student = AutoModel.from_pretrained(made.folder)
    assert makd.fingerprint(student) == made.metrics["fingerprint"]


@pytest.mark.usefixtures("package")
def test_a_users_aspect_is_a_mean_over_real_tokens_alone_and_is_learned_from():
    teacher, inputs = tiny("bert"), batch(tiny("bert"))
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd", ranks="uniform")
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(4)]
    arguments = TrainingArguments(
        output_dir="unused", max_steps=1, per_device_train_batch_size=4, report_to="none", save_strategy="no",
        logging_steps=1, learning_rate=0.0, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    plan = Plan(terms=(makd.Term(aspect="lengths", layers="last"),))
    trainer = makd.DistillTrainer(student, teacher, plan=plan, args=arguments, train_dataset=rows)
    trainer.train()
    with torch.no_grad():
        ours, theirs = (
            model.eval()(**inputs).last_hidden_state[inputs["attention_mask"].bool()] for model in (student, teacher)
        )
    expected = (ours.norm(dim=-1).log() - theirs.norm(dim=-1).log()).square().mean()
    assert trainer.state.log_history[0]["lengths"] == pytest.approx(float(expected), rel=1e-4)


def test_a_model_type_of_a_users_package_is_resolved_compressed_and_loaded_by_name(
    package, run, tokenizer, teacher_class, tmp_path
):
    model, config = teacher_class
    torch.manual_seed(0)
    model(config(vocab_size=300)).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    code, _, err = run(
        "compress", "--teacher", tmp_path / "teacher", "--data.path", tmp_path / "texts.txt", "--budget.keep_linears",
        "0.5", "--recipe.training.steps", "2", "--recipe.training.batch_size", "4", "--recipe.evaluation.latency",
        "false", "--output", tmp_path / "student",
    )  # fmt: skip
    assert code == 0, err
    environment = json.loads((tmp_path / "student" / "environment.json").read_text())
    assert environment["extensions"]["anatomy 'twostroke'"].startswith("makd-example 1.0 (")
    student = AutoModel.from_pretrained(tmp_path / "student")
    anatomy = resolve(student)
    assert anatomy.family == "twostroke"
    assert anatomy.off.keys() == {"attention"}
    assert [layer.linears for layer in anatomy.layers] == [
        tuple(f"strokes.{index}.{name}" for name in ("mixed", "merge", "widen", "narrow")) for index in range(2)
    ]
    assert isinstance(student.strokes[0].narrow, makd.LowRankLinear)


def test_a_stopped_run_is_not_gone_on_with_after_the_package_has_changed(encoder_folder, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(told):
        if told.what == "distil" and told.done >= 3:
            raise Stopped

    def arguments():
        return str(encoder_folder), TEXTS, makd.Budget(keep_linears=0.5), recipe(save_every=1), tmp_path / "student"

    with monkeypatch.context() as here:
        install(tmp_path / "site-packages", here)
        with pytest.raises(Stopped):
            makd.compress(*arguments(), on_progress=stop)
    for table in TABLES:
        for name in set(table._items).difference(table.own):
            del table._items[name]
    install(tmp_path / "newer", monkeypatch, version="1.1")
    with pytest.raises(OutputError, match=r"aspect 'lengths' was makd-example 1\.0 .*, is makd-example 1\.1 "):
        makd.compress(*arguments(), resume=True)


@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_a_stopped_run_goes_on_with_the_same_package_to_the_same_student(encoder_folder, tmp_path):
    class Stopped(Exception):
        pass

    def stop(told):
        if told.what == "distil" and told.done >= 3:
            raise Stopped

    arguments = str(encoder_folder), TEXTS, makd.Budget(keep_linears=0.5), recipe(save_every=1)
    with pytest.raises(Stopped):
        makd.compress(*arguments, tmp_path / "stopped", on_progress=stop)
    resumed = makd.compress(*arguments, tmp_path / "stopped", resume=True)
    whole = makd.compress(*arguments, tmp_path / "whole")
    assert resumed.metrics["fingerprint"] == whole.metrics["fingerprint"]


@pytest.mark.usefixtures("package")
def test_of_settings_only_what_a_users_package_offers_is_told():
    known = extensions_of({"method": [{"settings": {"solver": "scaled_svd", "ranks": "uniform"}}]})
    assert list(known) == ["solver 'scaled_svd'"]
    assert extensions_of({"solver": "svd", "aspect": "hidden", "model_type": "bert", "other": "lengths"}) == {}


@pytest.mark.parametrize("name", BASELINES)
def test_every_setting_of_a_method_that_names_a_solver_is_looked_up(name):
    texts = {item.name: getattr(BASELINES[name], item.name) for item in fields(BASELINES[name])}
    solvers = {key for key, value in texts.items() if isinstance(value, str) and value in {"auto", *SOLVERS.own}}
    assert solvers <= {key for key, table in SETTINGS.items() if table is SOLVERS}


def comparison(teacher, **settings):
    return makd.Experiment(
        teacher=str(teacher),
        tasks=(makd.TaskConfig(name="glue/mrpc", path="mrpc"),),
        methods=(makd.MethodConfig(name="makd", settings=settings),),
        budgets=(makd.Budget(keep_linears=0.5),),
        output="unused",
        device="cpu",
    )


def hashes_of(experiment):
    cell = all_cells(experiment)[0]
    return cell_hash(experiment, cell, {}), latency_hash(experiment, cell)


def test_a_cell_that_begins_from_a_users_solver_is_another_one_when_the_solver_changes():
    def negative(weight, inputs, gradients, rank):
        return decompose_svd(-weight, inputs, gradients, rank)

    SOLVERS.register("mine", Solver("mine", decompose=decompose_svd))
    experiment = comparison("teacher", start="mine")
    before = hashes_of(experiment)
    assert hashes_of(experiment) == before
    SOLVERS.register("mine", Solver("mine", decompose=negative))
    assert not set(hashes_of(experiment)) & set(before)


@pytest.mark.usefixtures("package")
def test_a_cell_of_a_teacher_with_a_users_anatomy_is_another_one_when_the_anatomy_changes(teacher_class, tmp_path):
    _, config = teacher_class
    config(vocab_size=300).save_pretrained(tmp_path / "teacher")
    experiment = comparison(tmp_path / "teacher")
    assert anatomy_of(experiment.teacher) == {"model_type": "twostroke"}
    before, teacher = hashes_of(experiment), teacher_hash(experiment, experiment.tasks[0], 1)
    ANATOMIES._origins["twostroke"] = "makd-example 1.1 (another digest)"
    assert not set(hashes_of(experiment)) & set(before)
    assert teacher_hash(experiment, experiment.tasks[0], 1) != teacher


def test_a_teacher_of_makds_own_anatomy_changes_no_hash(encoder_folder, package):
    assert extensions_of(anatomy_of(str(encoder_folder))) == {}
    assert anatomy_of("no/such/model/at/all") == {}


def test_what_is_registered_in_python_is_known_by_name_and_by_its_code():
    def loss(student, teacher, mask):
        return (student - teacher)[mask].abs().mean()

    ASPECTS.register("absolute", Aspect("absolute difference", at="hidden", loss=loss))
    assert makd.Term(aspect="absolute").aspect == "absolute"
    assert "absolute" in list(ASPECTS)
    (told,) = extensions_of({"terms": [{"aspect": "absolute"}]}).values()
    assert told.startswith("registered in tests.test_extensions (")
    ASPECTS.register("absolute", Aspect("another one", at="hidden", loss=loss))
    assert extensions_of({"aspect": "absolute"}) != {"aspect 'absolute'": told}


@pytest.mark.parametrize(
    ("table", "name", "thing", "said"),
    [
        (SOLVERS, "svd", Solver("mine", decompose=decompose_svd), "makd's own"),
        (SOLVERS, "mine", Solver("nothing"), "its `decompose` is no function"),
        (SOLVERS, "mine", Solver("x", in_forward_order=True, decompose=decompose_svd), "only makd's own solvers"),
        (SOLVERS, "mine", decompose_svd, "is a makd.solvers.Solver; got function"),
        (ASPECTS, "mine", Aspect("x", at="attention", loss=decompose_svd), "'linear' or 'hidden'; got 'attention'"),
        (ASPECTS, "mine", Aspect("x", at="hidden"), "its `loss` is no function"),
        (ASPECTS, "mine", Aspect("x", at="hidden", measure="mse"), "neither a `measure` nor `settings`"),
        (ASPECTS, "mine", Aspect("x", at="hidden", settings=("k",)), "neither a `measure` nor `settings`"),
        (ANATOMIES, "mine", Family(("other",), ()), "its model_types are other"),
        (ANATOMIES, "bert", Family(("bert",), ()), "makd's own"),
    ],
)  # fmt: skip
def test_what_is_no_solver_aspect_or_anatomy_is_refused_when_it_is_registered(table, name, thing, said):
    with pytest.raises(ExtensionError, match=said):
        table.register(name, thing)


def test_a_package_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "modules"
    broken.mkdir()
    (broken / "broken_example.py").write_text("import something_that_is_not_there\n")
    entries = "[makd.solvers]\nbroken = broken_example:SOLVER\n"
    install(tmp_path / "site", monkeypatch, name="broken-example", version="0.3", entries=entries, modules=broken)
    assert makd.FactorizeConfig(solver="svd").solver == "svd"  # nothing else is touched by it
    said = "Solver 'broken' is of package broken-example 0.3 .* cannot be loaded: ModuleNotFoundError"
    with pytest.raises(ExtensionError, match=said):
        makd.FactorizeConfig(solver="broken")


def test_a_name_that_two_packages_offer_or_that_is_makds_own_is_refused(tmp_path, monkeypatch):
    install(tmp_path / "one", monkeypatch)
    entries = "[makd.solvers]\nscaled_svd = makd_example.solver:SCALED_SVD\nsvd = makd_example.solver:SCALED_SVD\n"
    install(tmp_path / "two", monkeypatch, name="other-example", entries=entries)
    with pytest.raises(ExtensionError, match=r"Several packages offer a solver 'scaled_svd'.*makd-example.*"):
        makd.FactorizeConfig(solver="scaled_svd")
    with pytest.raises(
        ExtensionError, match=r"other-example 1\.0 .* offers a solver 'svd', which is the name of makd's own"
    ):
        makd.FactorizeConfig(solver="svd")


@pytest.mark.usefixtures("package")
def test_an_unknown_name_is_offered_the_nearest_of_a_users_package():
    with pytest.raises(UnknownNameError, match="Did you mean 'scaled_svd'"):
        makd.FactorizeConfig(solver="scaled_sdv")


def _half(weight, inputs, gradients, rank):
    found = decompose_svd(weight, None)
    return Decomposition(found.left[:, :1], found.right[:1], found.singular_values[:1], found.dtype)


@pytest.mark.parametrize(
    ("decompose", "said"),
    [
        (lambda *_: 1 / 0, "Solver 'mine' failed: ZeroDivisionError"),
        (lambda *_: None, "it is a NoneType"),
        (_half, "terms were asked for, and it has 1"),
        (lambda weight, *_: Decomposition(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2), weight.dtype), "left and"),
        (
            lambda weight, *_: Decomposition(*(torch.full_like(weight[:32, :32], torch.nan),) * 2, torch.ones(32),
                                             weight.dtype),
            "left and right are|NaN or infinite",
        ),
    ],
)  # fmt: skip
def test_a_solver_that_gives_no_decomposition_is_named(decompose, said):
    SOLVERS.register("mine", Solver("mine", decompose=decompose))
    with pytest.raises(ExtensionError, match=said):
        makd.factorize(tiny("bert"), makd.Budget(keep_linears=0.5), solver="mine")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda student, teacher, mask: student.nothing, "loss of aspect 'mine' failed: AttributeError"),
        (lambda student, teacher, mask: (student - teacher).square(), "is a scalar of floating point; got a tensor"),
        (lambda student, teacher, mask: (student.detach() - teacher).square().mean(), "does not depend on the student"),
        (lambda student, teacher, mask: 0.0, "got float"),
    ],
)
def test_a_loss_that_is_none_is_named(loss, said):
    ASPECTS.register("mine", Aspect("mine", at="hidden", loss=loss))
    student = torch.randn(2, 3, 4, requires_grad=True)
    with pytest.raises(ExtensionError, match=said):
        own_loss("mine", student, torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    "setting", [{"distance": "cosine"}, {"temperature": 2.0}, {"pooling": "cls"}, {"roles": ("q",)}]
)
def test_a_setting_that_does_nothing_with_a_users_aspect_is_refused(setting):
    ASPECTS.register("mine", Aspect("mine", at="hidden", loss=lambda *_: 0))
    with pytest.raises(SettingError, match="and does nothing with mine; got"):
        makd.Term(aspect="mine", **setting)


def test_where_no_token_counts_a_users_loss_is_0_and_not_asked():
    ASPECTS.register("mine", Aspect("mine", at="hidden", loss=lambda *_: 1 / 0))
    student = torch.full((2, 3, 4), torch.nan, requires_grad=True)
    loss = own_loss("mine", student, torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    assert float(loss.detach()) == 0
    loss.backward()
    assert float(student.grad.abs().sum()) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes that talk by gloo")
@pytest.mark.usefixtures("package")
def test_every_process_of_a_run_finds_the_package(encoder_folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text("recipe:\n  plan: {terms: [{aspect: lengths}, {aspect: hidden}]}\n")
    code, _, err = end(
        begin(
            "-m", "makd", "compress", "--config", tmp_path / "recipe.yaml", "--teacher", encoder_folder,
            "--output", tmp_path / "student", "--budget.keep_linears", 0.5, "--data.path", "pydoc",
            "--data.max_length", 16, "--data.rows", 60, "--recipe.factorize.solver", "scaled_svd",
            "--recipe.training.steps", 2, "--recipe.training.batch_size", 4,
            "--recipe.evaluation.latency", "false", "--recipe.device", "cpu",
        )
    )  # fmt: skip
    assert code == 0, err
    environment = json.loads((tmp_path / "student" / "environment.json").read_text())
    assert set(environment["extensions"]) == {"aspect 'lengths'", "solver 'scaled_svd'"}


@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_a_teacher_cache_keeps_what_a_users_aspect_compares_with(encoder_folder, tmp_path):
    arguments = str(encoder_folder), TEXTS
    makd.build_cache(*arguments, recipe(), tmp_path / "cache")
    settings = recipe(steps=2)
    cached = replace(settings, cache=str(tmp_path / "cache"))
    losses = [
        makd.compress(*arguments, makd.Budget(keep_linears=0.5), one, tmp_path / name).metrics["fidelity"]["after"]
        for name, one in (("live", settings), ("cached", cached))
    ]
    assert losses[1]["cosine"] == pytest.approx(losses[0]["cosine"], abs=1e-3)


def test_layers_that_are_taught_one_by_one_learn_a_users_aspect():
    asked = []

    def loss(student, teacher, mask):
        asked.append(tuple(student.shape))
        return (student - teacher)[mask].square().mean()

    ASPECTS.register("counted", Aspect("counted", at="linear", loss=loss))
    plan = Plan(terms=(makd.Term(aspect="counted", roles=("q",)),))
    teacher, text = tiny("bert"), calibration()
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd", ranks="uniform")
    makd.teach_layers_(student, teacher, plan, text * 2, makd.LayerwiseConfig(steps=2))
    assert set(asked) == {(4, 12, 32)}


@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_a_users_solver_streams_to_the_student_that_it_makes_in_memory(encoder_folder, tmp_path):
    arguments = str(encoder_folder), TEXTS, makd.Budget(keep_linears=0.5), recipe()
    streamed = AutoModel.from_pretrained(makd.factorize_streamed(*arguments, tmp_path / "streamed").folder)
    whole = AutoModel.from_pretrained(pipeline.factorize_only(*arguments, tmp_path / "whole").folder)
    assert makd.fingerprint(streamed) == makd.fingerprint(whole)
