"""Run by a Python that has optimum and no makd: opens an export with a pipeline, and writes what it says.

python elsewhere.py onnx|transformers TASK FOLDER TEXT OUTPUT
"""

import importlib.util
import json
import sys

import optimum.onnxruntime as ort
import transformers

CLASSES = {
    "feature-extraction": "ForFeatureExtraction",
    "fill-mask": "ForMaskedLM",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "text-generation": "ForCausalLM",
}


def main(runtime: str, task: str, folder: str, text: str, output: str) -> None:
    """See the module's docstring."""
    assert importlib.util.find_spec("makd") is None, "makd is installed there"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = folder
    if runtime == "onnx":
        model = getattr(ort, f"ORTModel{CLASSES[task]}").from_pretrained(folder)
    pipeline = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
    settings = {"max_new_tokens": 5, "do_sample": False} if task == "text-generation" else {}
    found = pipeline(text, **settings)
    with open(output, "w", encoding="utf-8") as file:
        json.dump(found, file, default=float)  # some scores are numpy's


if __name__ == "__main__":
    main(*sys.argv[1:])
