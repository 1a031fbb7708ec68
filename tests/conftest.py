"""What tests share: a tiny teacher on disk, with a tokenizer made on the spot. Nothing is ever downloaded."""

import gc
import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pydoc_data.topics

import pytest
import torch
from datasets import arrow_dataset, fingerprint
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.type_checks import check_shapes

check_shapes()  # before any of makd is imported

# of property tests: how long an example takes depends on what else the machine does
settings.register_profile("makd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("makd")


def pytest_collection_finish():
    """What is imported by then stays: without looking through it again and again, tests take a tenth less time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture
def run(capfd):
    """Run `makd WORDS...` in this process; gives (exit code, stdout, stderr)."""
    from makd.cli.main import main

    def runner(*words):
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return code, out, " ".join(err.split())

    return runner


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """300 word pieces of the built-in text."""
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    words.train_from_iterator(list(pydoc_data.topics.topics.values())[:10], trainer)
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", eos_token="[SEP]",
    )  # fmt: skip


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory, tokenizer):
    """A folder with a tiny BERT and its tokenizer, as a hub checkpoint has them."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory, tokenizer):
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def installed(tmp_path):
    """A folder that says of makd what an installation does: its entry points."""
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    entries = re.search(r'^\[project.entry-points."(torch.backends)"\].*\n(\w+) = "(.*)"$', project, re.MULTILINE)
    folder = tmp_path / "installed"
    there = folder / "makd-0.1.0.dist-info"
    there.mkdir(parents=True)
    (there / "METADATA").write_text("Metadata-Version: 2.1\nName: makd\nVersion: 0.1.0\n")
    (there / "entry_points.txt").write_text("[{}]\n{} = {}\n".format(*entries.groups()))
    return folder


@pytest.fixture(scope="session", autouse=True)
def unhashed_maps():
    """`Dataset.map` hashes its function to find an older result: here seconds each, for type checks are around all."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (fingerprint, arrow_dataset):
            patch.setattr(module, "update_fingerprint", lambda *_: fingerprint.generate_random_fingerprint())
        yield
