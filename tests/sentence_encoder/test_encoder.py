"""What is read of a sentence-transformers folder, and what is refused before any work, by name."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

import makd
from makd.anatomy import resolve
from makd.aspects import activate
from makd.errors import ModelLoadError, SettingError
from makd.loading import load_model, load_tokenizer
from makd.sentence_encoder import encoder_of, find_folder, origin_of, read_sentence_encoder, read_text_settings
from tests.models import tiny
from tests.sentence_encoder.folders import FLAGS, WIDTH, add_dense, copy, embed, make_folder, write_json

TEXTS = ["The assignment statement binds names.", "A tuple is immutable, and a list is not.", "Yield!"]
PLAN = makd.Plan(terms=(makd.Term(aspect="embedding"), makd.Term(aspect="similarity")))


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory, tokenizer):
    return make_folder(tmp_path_factory.mktemp("dense"), tokenizer, "cls", after=("Dense", "Normalize"))


@pytest.fixture(scope="module")
def cls_folder(tmp_path_factory, tokenizer):
    return make_folder(tmp_path_factory.mktemp("cls"), tokenizer, "cls", after=("Normalize",))


def change(folder, file, **changes):
    path = folder / file
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | changes)


class TestPoolingOfAFolder:
    @pytest.mark.parametrize("pooling", [*FLAGS, "cls+mean", "mean+last"])
    def test_is_read_of_older_folders(self, tmp_path, tokenizer, pooling):
        folder = make_folder(tmp_path / "teacher", tokenizer, pooling)
        assert read_sentence_encoder(folder).pooling == pooling

    @pytest.mark.parametrize(
        ("mode", "pooling"),
        [("cls", "cls"), ("lasttoken", "last"), ("mean_sqrt_len_tokens", "mean_sqrt_len"),
         ("weightedmean", "weighted_mean"), (["max", "cls"], "max+cls")],
    )  # fmt: skip
    def test_is_read_of_newer_folders(self, cls_folder, tmp_path, mode, pooling):
        folder = copy(cls_folder, tmp_path / "teacher")
        write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": WIDTH, "pooling_mode": mode})
        assert read_sentence_encoder(folder).pooling == pooling

    def test_is_what_a_plan_teaches(self, cls_folder):
        active = activate(PLAN, resolve(AutoModel.from_pretrained(cls_folder)))
        assert [term.term.pooling for term in active.terms] == ["cls", "cls"]

    def test_without_a_folder_is_mean(self, encoder_folder):
        active = activate(PLAN, resolve(AutoModel.from_pretrained(encoder_folder)))
        assert [term.term.pooling for term in active.terms] == ["mean", "mean"]

    def test_of_the_teacher_counts_also_for_a_student_from_elsewhere(self, cls_folder, encoder_folder):
        student, teacher = (resolve(AutoModel.from_pretrained(folder)) for folder in (encoder_folder, cls_folder))
        assert activate(PLAN, student, teacher).terms[0].term.pooling == "cls"

    def test_is_found_from_another_working_directory(self, cls_folder, tmp_path, monkeypatch):
        copy(cls_folder, tmp_path / "here" / "teacher")
        monkeypatch.chdir(tmp_path / "here")
        model = load_model("teacher")
        monkeypatch.chdir(tmp_path)
        assert encoder_of(origin_of(model)).pooling == "cls"

    def test_that_was_moved_away_is_not_taken_for_the_mean_without_a_word(self, cls_folder, tmp_path, caplog):
        folder = copy(cls_folder, tmp_path / "teacher")
        model = AutoModel.from_pretrained(folder)
        shutil.move(folder, tmp_path / "elsewhere")
        with caplog.at_level(logging.WARNING):
            assert encoder_of(origin_of(model)).pooling == "mean"
        assert f"{folder}, where a model was loaded from, is no longer there" in caplog.text

    def test_of_a_model_made_in_hand_is_the_mean_as_ever(self, caplog):
        with caplog.at_level(logging.WARNING):
            assert encoder_of(origin_of(tiny("bert"))).pooling == "mean"
        assert not caplog.text

    def test_that_the_recipe_overrules_is_said(self, cls_folder, tmp_path, caplog):
        folder = copy(cls_folder, tmp_path / "overruled")
        plan = makd.Plan(terms=(makd.Term(aspect="embedding", pooling="mean"),))
        with caplog.at_level(logging.WARNING):
            active = activate(plan, resolve(AutoModel.from_pretrained(folder)))
        assert active.terms[0].term.pooling == "mean"
        assert "The pooling is mean, as the settings say, but" in caplog.text
        assert "says cls, which is what its users get" in caplog.text


class TestModulesAfterThePooling:
    def test_are_part_of_an_embedding(self, dense_folder):
        model, tokenizer = AutoModel.from_pretrained(dense_folder), AutoTokenizer.from_pretrained(dense_folder)
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            got = encoder_of(origin_of(model))(model(**batch)[0], batch["attention_mask"].bool())
        expected = embed(dense_folder, TEXTS, "cls", dense_folder / "2_Dense")
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("changes", "name"),
        [({"activation_function": "os.system"}, "os.system"),
         ({"activation_function": "torch.nn.modules.activation.Softmax"}, "Softmax"),
         ({"module_input_name": "token_embeddings"}, "token_embeddings")],
    )  # fmt: skip
    def test_that_makd_cannot_carry_out_are_refused(self, dense_folder, tmp_path, changes, name):
        folder = copy(dense_folder, tmp_path / "teacher")
        add_dense(folder / "2_Dense", WIDTH, **changes)
        with pytest.raises(SettingError, match=name):
            read_sentence_encoder(folder)

    @pytest.mark.parametrize("name", ["linear.weight", "linear.bias"])
    @pytest.mark.parametrize("wrong", [None, torch.zeros(3)])
    def test_with_weights_missing_or_of_another_shape_are_refused(self, dense_folder, tmp_path, name, wrong):
        folder = copy(dense_folder, tmp_path / "teacher")
        weights = load_file(folder / "2_Dense" / "model.safetensors")
        del weights[name]
        save_file(weights | ({} if wrong is None else {name: wrong}), folder / "2_Dense" / "model.safetensors")
        with pytest.raises(ModelLoadError, match=f"has to hold {name}"):
            read_sentence_encoder(folder)

    def test_that_do_not_fit_onto_each_other_are_refused(self, tmp_path, tokenizer):
        folder = make_folder(tmp_path / "teacher", tokenizer, after=("Dense", "Dense"))
        add_dense(folder / "3_Dense", 20)
        with pytest.raises(SettingError, match="takes 20 channels, but the module before it gives 16"):
            read_sentence_encoder(folder)

    def test_may_add_what_they_take(self, dense_folder, tmp_path):
        folder = copy(dense_folder, tmp_path / "teacher")
        add_dense(folder / "2_Dense", WIDTH, use_residual=True)
        weights = load_file(folder / "2_Dense" / "model.safetensors")
        weights["residual.weight"] = torch.randn(16, WIDTH)
        save_file(weights, folder / "2_Dense" / "model.safetensors")
        vectors = torch.randn(3, WIDTH)
        expected = torch.tanh(vectors @ weights["linear.weight"].T + weights["linear.bias"])
        expected += vectors @ weights["residual.weight"].T
        torch.testing.assert_close(read_sentence_encoder(folder).after(vectors), expected)

    def test_with_weights_in_a_pickle_alone_are_refused(self, dense_folder, tmp_path):
        folder = copy(dense_folder, tmp_path / "teacher")
        (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
        with pytest.raises(ModelLoadError, match="in a pickle alone, which makd does not open"):
            read_sentence_encoder(folder)

    def test_of_another_width_than_the_pooling_are_refused(self, dense_folder, tmp_path):
        folder = copy(dense_folder, tmp_path / "teacher")
        add_dense(folder / "2_Dense", 48)
        with pytest.raises(SettingError, match="pools to 32 channels, but the module that follows takes 48"):
            encoder_of(origin_of(AutoModel.from_pretrained(folder)))


class TestWhatMakdCannotCarryOut:
    @pytest.mark.parametrize(
        ("types", "name"),
        [(["sentence_transformers.models.Transformer", "sentence_transformers.models.WordWeights"], "WordWeights"),
         (["custom_st.Transformer", "sentence_transformers.models.Pooling"], "custom_st.Transformer"),
         (["sentence_transformers.models.Transformer"], "has the modules Transformer"),
         ([], "has the modules none")],
    )  # fmt: skip
    def test_in_modules_is_refused_before_any_work(self, cls_folder, tmp_path, types, name):
        folder = copy(cls_folder, tmp_path / "teacher")
        paths = ["", "1_Pooling"]
        write_json(folder / "modules.json", [{"type": t, "path": p} for t, p in zip(types, paths, strict=False)])
        with pytest.raises(SettingError, match=name):
            makd.compress(str(folder), ["a text"] * 20, makd.Budget(keep_linears=0.5), output=tmp_path / "student")
        assert not (tmp_path / "student").exists()

    @pytest.mark.parametrize(
        "changes",
        [{"transformer_task": "fill-mask"}, {"module_output_name": "sentence_embedding"}, {"config_args": {"a": 1}},
         {"modality_config": ["text"]},
         {"modality_config": {"text": {"method": "get_text_features", "method_output_name": "pooler_output"}}}],
    )  # fmt: skip
    def test_in_settings_is_refused(self, cls_folder, tmp_path, changes):
        folder = copy(cls_folder, tmp_path / "teacher")
        change(folder, "sentence_bert_config.json", **changes)
        with pytest.raises(SettingError, match=r"Remove modules\.json"):
            read_sentence_encoder(folder)

    @pytest.mark.parametrize("mode", ["median", [], [["cls"]], 3, {"cls": True}, ["cls", "median"]])
    def test_in_the_pooling_is_refused(self, cls_folder, tmp_path, mode):
        folder = copy(cls_folder, tmp_path / "teacher")
        change(folder, "1_Pooling/config.json", pooling_mode=mode)
        with pytest.raises(SettingError, match="makd knows cls, max, mean"):
            read_sentence_encoder(folder)

    def test_a_missing_pooling_is_said(self, cls_folder, tmp_path):
        folder = copy(cls_folder, tmp_path / "teacher")
        (folder / "1_Pooling" / "config.json").unlink()
        with pytest.raises(ModelLoadError, match="No such file"):
            read_sentence_encoder(folder)

    def test_is_refused_also_where_only_the_measures_need_it(self, cls_folder, tmp_path):
        folder = copy(cls_folder, tmp_path / "teacher")
        change(folder, "1_Pooling/config.json", pooling_mode="median")
        plan = makd.Plan(terms=(makd.Term(aspect="hidden"),))
        recipe = makd.Recipe(plan=plan)
        with pytest.raises(SettingError, match="the pooling 'median'"):
            makd.compress(str(folder), ["a text"] * 20, makd.Budget(keep_linears=0.5), recipe, tmp_path / "student")

    @pytest.mark.parametrize("path", ["../outside", "/etc", "1_Pooling/../../x", "..\\x", "C:x"])
    def test_a_path_out_of_the_folder_is_refused(self, cls_folder, tmp_path, path):
        folder = copy(cls_folder, tmp_path / "teacher")
        write_json(folder / "modules.json", [{"type": "sentence_transformers.models.Pooling", "path": path}])
        with pytest.raises(ModelLoadError, match="outside of the folder"):
            find_folder(str(folder)) and load_model(str(folder))

    @pytest.mark.parametrize("content", ["{", "{}", "[1]", '[{"type": "x"}]', '[{"type": 1, "path": ""}]', "null"])
    def test_a_damaged_list_of_modules_is_refused(self, cls_folder, tmp_path, content):
        folder = copy(cls_folder, tmp_path / "teacher")
        (folder / "modules.json").write_text(content)
        with pytest.raises(ModelLoadError, match=r"modules\.json"):
            load_model(str(folder))


class TestTextSettings:
    @pytest.mark.parametrize(
        ("file", "changes", "match"),
        [("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length"),
         ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length"),
         ("sentence_bert_config.json", {"do_lower_case": "yes"}, "do_lower_case"),
         ("config_sentence_transformers.json", {"default_prompt_name": "other"}, "default prompt 'other'"),
         ("config_sentence_transformers.json", {"default_prompt_name": ["a"]}, "default prompt")],
    )  # fmt: skip
    def test_of_a_wrong_type_are_refused(self, cls_folder, tmp_path, file, changes, match):
        folder = copy(cls_folder, tmp_path / "teacher")
        change(folder, file, **changes)
        with pytest.raises(SettingError, match=match):
            read_text_settings(folder)

    def test_lower_case_is_the_tokenizers(self, cls_folder, tmp_path):
        folder = copy(cls_folder, tmp_path / "teacher")
        upper, lower = "A Tuple IS Immutable", "a tuple is immutable"
        plain = load_tokenizer(str(folder))
        assert plain(upper)["input_ids"] != plain(lower)["input_ids"]
        change(folder, "sentence_bert_config.json", do_lower_case=True)
        lowered = load_tokenizer(str(folder))
        assert lowered(upper)["input_ids"] == plain(lower)["input_ids"]
        lowered.save_pretrained(tmp_path / "saved")
        assert AutoTokenizer.from_pretrained(tmp_path / "saved")(upper)["input_ids"] == plain(lower)["input_ids"]

    def test_lower_case_leaves_a_tokenizer_in_hand_as_it_is(self, cls_folder, tmp_path):
        from makd.data import choose_tokenizer

        folder = copy(cls_folder, tmp_path / "teacher")
        change(folder, "sentence_bert_config.json", do_lower_case=True)
        mine = AutoTokenizer.from_pretrained(folder)
        before = mine("A Tuple")["input_ids"]
        assert choose_tokenizer(mine, str(folder))("A Tuple")["input_ids"] == mine("a tuple")["input_ids"]
        assert mine("A Tuple")["input_ids"] == before


class TestAModelFromTheHub:
    def test_has_the_folder_of_its_repository(self, dense_folder, tmp_path, monkeypatch):
        commit = "0123456789" * 4
        place = tmp_path / "models--org--encoder"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(commit)
        shutil.copytree(dense_folder, place / "snapshots" / commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        model = load_model("org/encoder")
        encoder = encoder_of(origin_of(model))
        assert encoder.pooling == "cls"
        assert encoder.after.width == WIDTH

    @pytest.mark.parametrize("name", ["org/never-loaded", "BertModel", "a b/c", "runs/gone", ""])
    def test_that_never_came_from_there_has_none(self, name):
        assert find_folder(name) is None


def test_a_sentence_encoder_is_loaded_without_a_head(tmp_path, tokenizer, cls_folder):
    folder = copy(cls_folder, tmp_path / "teacher")
    change(folder, "config.json", architectures=["BertForMaskedLM"])
    assert type(load_model(str(folder))).__name__ == "BertModel"
    assert type(load_model(str(folder), head="masked_lm")).__name__ == "BertForMaskedLM"
