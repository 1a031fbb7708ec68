"""Students load without `import makd`, and nobody else notices that makd is installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import makd
from tests.models import tiny

SOURCE = Path(makd.__file__).parents[1]
PROJECT = (SOURCE.parent / "pyproject.toml").read_text(encoding="utf-8")
LISTS = """
AUTO_QUANTIZATION_CONFIG_MAPPING = {}
class QuantizationConfigMixin: pass
def register_quantization_config(name):
    return lambda cls: AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(name, cls)
"""
"""What `makd_autoload` knows of `transformers.quantizers.auto`."""


def run(script, folder, *words):
    """What a new process prints that finds `folder` first, then makd's sources."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(SOURCE)))}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True, text=True, check=False, cwd=folder, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def students(tmp_path, tokenizer):
    """Folders with a classifier and a decoder."""
    found = []
    for name, head in (("bert", "sequence_classification"), ("llama", "causal_lm")):
        found.append(tmp_path / name)
        teacher = tiny(name, head, vocab_size=300)
        makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd").save_pretrained(found[-1])
        tokenizer.save_pretrained(found[-1])
    return found


def test_what_loads_models_loads_students_by_itself(installed, students):
    script = """
import json, sys
from sentence_transformers import SentenceTransformer
from transformers import pipeline
assert not any(name.split(".")[0] == "makd" for name in sys.modules)
scores = pipeline("text-classification", sys.argv[1], top_k=None)(["A list."])[0]
told = pipeline("text-generation", sys.argv[2])("A list", max_new_tokens=4, do_sample=False, return_full_text=False)
embedding = SentenceTransformer(sys.argv[1], device="cpu").encode("A list.")
print(json.dumps([{one["label"]: one["score"] for one in scores}, told[0]["generated_text"], embedding.tolist()]))
"""
    scores, told, embedding = json.loads(run(script, installed, *students))

    tokenizer = AutoTokenizer.from_pretrained(students[0])
    classifier = AutoModelForSequenceClassification.from_pretrained(students[0])
    with torch.no_grad():
        expected = classifier(**tokenizer("A list.", return_tensors="pt")).logits.softmax(-1)[0].tolist()
    assert scores == pytest.approx(dict(zip(("LABEL_0", "LABEL_1"), expected, strict=True)), abs=1e-6)
    inputs = tokenizer("A list", return_tensors="pt", return_token_type_ids=False)
    decoder = AutoModelForCausalLM.from_pretrained(students[1])
    written = decoder.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert told == tokenizer.decode(written, skip_special_tokens=True)
    assert embedding == pytest.approx(SentenceTransformer(str(students[0])).encode("A list.").tolist(), abs=1e-6)


def test_torch_calls_it_and_imports_nothing_of_makd(installed):
    script = """
import sys, torch
print(sorted(name for name in sys.modules if name.startswith("makd")), type(sys.meta_path[0]).__name__)
"""
    assert run(script, installed) == "['makd_autoload'] Watch\n"


def test_the_file_is_installed_beside_the_package():
    included = re.search(r"^\[tool.hatch.build.targets.wheel.force-include\].*\n(.*)$", PROJECT, re.MULTILINE)[1]
    assert included == '"src/makd_autoload.py" = "makd_autoload.py"'
    assert (SOURCE / "makd_autoload.py").is_file()


class TestArm:
    """On a stand-in of transformers, without torch."""

    @pytest.fixture
    def folder(self, tmp_path):
        package = tmp_path / "transformers"
        (package / "quantizers").mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "quantizers" / "__init__.py").touch()
        (package / "quantizers" / "auto.py").write_text(LISTS)
        (package / "modeling_utils.py").write_text("import transformers.quantizers.auto")
        return tmp_path

    BEGIN = "import sys, makd_autoload; before = list(sys.meta_path); makd_autoload.arm(); "
    ENTERED = "print(list(sys.modules['transformers.quantizers.auto'].AUTO_QUANTIZATION_CONFIG_MAPPING))"

    @pytest.mark.parametrize(
        "first", ["", "import transformers.quantizers.auto; ", "import transformers.modeling_utils; "]
    )
    def test_makd_is_entered_once_whatever_was_imported_first(self, folder, first):
        script = first + self.BEGIN + "makd_autoload.arm(); import transformers.modeling_utils; " + self.ENTERED
        assert run(script + "; assert sys.meta_path == before; makd_autoload.arm(); " + self.ENTERED, folder) == (
            "['makd']\n" * 2
        )

    def test_it_may_be_called_while_transformers_makes_its_list(self, folder):
        """As by an `import torch` in there that is the first of the process."""
        auto = folder / "transformers" / "quantizers" / "auto.py"
        auto.write_text("import makd_autoload\nmakd_autoload.arm()\n" + LISTS)
        script = "import sys, transformers.quantizers.auto, transformers.modeling_utils; "
        assert run(script + self.ENTERED, folder) == "['makd']\n"

    def test_who_only_asks_where_the_list_is_changes_nothing(self, folder):
        script = self.BEGIN + (
            "import importlib.util; importlib.util.find_spec('transformers.quantizers.auto'); "
            "import transformers.modeling_utils; "
        )
        assert run(script + self.ENTERED, folder) == "['makd']\n"

    def test_the_module_is_as_if_nobody_had_watched(self, folder):
        script = self.BEGIN + (
            "import transformers.quantizers.auto as auto; "
            "print(type(auto.__loader__).__name__, auto.__spec__.loader is auto.__loader__)"
        )
        assert run(script, folder) == "SourceFileLoader True\n"

    def test_a_failing_import_fails_as_it_did_and_is_watched_again(self, folder):
        auto = folder / "transformers" / "quantizers" / "auto.py"
        auto.write_text("import sys\nif 'again' not in sys.modules: raise RuntimeError('not yet')\n" + LISTS)
        script = (
            self.BEGIN
            + """
try:
    import transformers.quantizers.auto
except RuntimeError as error:
    print(error)
sys.modules["again"] = sys
import transformers.modeling_utils
"""
        )
        assert run(script + self.ENTERED, folder) == "not yet\n['makd']\n"

    @pytest.mark.parametrize("lists", ["", "AUTO_QUANTIZATION_CONFIG_MAPPING = {}"])
    def test_a_list_of_another_form_is_left_alone(self, folder, lists):
        (folder / "transformers" / "quantizers" / "auto.py").write_text(lists)
        assert (
            run(self.BEGIN + "import transformers.modeling_utils; print(sys.meta_path == before)", folder) == "True\n"
        )

    def test_what_is_wrong_with_makd_is_an_error_where_a_student_is_loaded(self, folder):
        (folder / "makd.py").write_text("raise ValueError('a script of that name')")
        script = (
            self.BEGIN
            + """
import transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known
try:
    known["makd"].from_dict({})
except ValueError as error:
    print(error)
"""
        )
        assert run(script, folder) == "a script of that name\n"
