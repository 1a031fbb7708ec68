"""Student and teacher are two models: what both share is not trained."""

import copy

import pytest
from peft import LoraConfig, get_peft_model

import makd
from makd import pipeline
from makd.distill import DistillTrainer
from makd.errors import SettingError
from tests.distill.layerwise.test_layerwise import Pair
from tests.distill.test_trainer import make_arguments, make_rows
from tests.models import tiny


def share_module(student, teacher):
    student.embeddings = teacher.embeddings


def share_layer(student, teacher):
    student.encoder.layer[0] = teacher.encoder.layer[1]


def share_memory(student, teacher):
    student.embeddings.word_embeddings.weight.data = teacher.embeddings.word_embeddings.weight.data[:]


def make_trainer(student, teacher, folder):
    return DistillTrainer(student, teacher, args=make_arguments(folder), train_dataset=make_rows())


@pytest.mark.parametrize(
    ("share", "named"),
    [
        (share_module, "student's embeddings.word_embeddings.weight is the teacher's embeddings.word_embeddings"),
        (share_layer, r"student's encoder.layer.0.\S+ is the teacher's encoder.layer.1."),
        (share_memory, "student's embeddings.word_embeddings.weight is the teacher's"),
    ],
)
def test_a_student_with_parts_of_its_teacher_is_refused_by_their_names(tmp_path, share, named):
    student, teacher = tiny("bert", seed=1), tiny("bert")
    share(student, teacher)
    with pytest.raises(SettingError, match=named):
        make_trainer(student, teacher, tmp_path)


def test_parts_that_are_frozen_may_be_shared_and_the_teacher_stays_what_it_was(tmp_path):
    student, teacher = tiny("bert", seed=1), tiny("bert")
    share_module(student, teacher)
    teacher.embeddings.requires_grad_(False)
    before = makd.fingerprint(teacher), makd.fingerprint(student)
    make_trainer(student, teacher, tmp_path).train()
    assert makd.fingerprint(teacher) == before[0]
    assert makd.fingerprint(student) != before[1]


def test_a_model_is_not_its_own_teacher(tmp_path):
    model = tiny("bert")
    with pytest.raises(SettingError, match="Student and teacher are one BertModel"):
        make_trainer(model, model, tmp_path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_a_model_is_not_the_teacher_of_the_adapters_in_it(tmp_path):
    teacher = tiny("bert")
    student = get_peft_model(teacher, LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(SettingError, match="PeftModel changes the model that it is given"):
        make_trainer(student, teacher, tmp_path)


def test_a_layer_with_a_part_of_the_teacher_s_is_not_taught():
    pair = Pair()
    ours, theirs = (model.encoder.layer[1].output for model in (pair.student, pair.teacher))
    ours.LayerNorm = theirs.LayerNorm
    with pytest.raises(SettingError, match="is the teacher's"):
        pair.teach()


def test_a_run_refuses_a_student_with_parts_of_its_teacher_before_any_work(tmp_path, tokenizer):
    teacher = tiny("bert", vocab_size=300, max_position_embeddings=128)
    student = copy.deepcopy(teacher)
    student.encoder.layer = student.encoder.layer[:1]
    student.config.num_hidden_layers = 1
    share_module(student, teacher)
    told = []
    with pytest.raises(SettingError, match="is the teacher's embeddings"):
        pipeline.distill(
            student, teacher, ["some text"] * 40, output=tmp_path / "out", tokenizer=tokenizer, on_progress=told.append
        )
    assert {event.what for event in told} <= {"load"}
