"""`makd factorize --stream`: the pipeline for teachers larger than memory, which stay on disk as their students do.

What would need a whole model in memory (fidelity, perplexity, latency, training) is not here: evaluate and distil the
student where it fits.
"""

import logging
import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase, set_seed

from makd.anatomy import resolve
from makd.config import Recipe
from makd.data import DataConfig, choose_tokenizer
from makd.distill import warn_slow_bfloat16
from makd.errors import ModelLoadError
from makd.evaluation import bytes_on_disk, parameter_counts
from makd.factorization.streamed import check_streamable, stream_student
from makd.factorization.work import Work
from makd.forecasting import check_stream
from makd.kinds import takes
from makd.loading import check_dtype, load_empty_model
from makd.pipeline import Report
from makd.preparation import Data, names_of, prepare
from makd.processes.first import in_first
from makd.progress import OnProgress, peak_bytes, reporting
from makd.random_state import keeping_random_state
from makd.ranks.budget import Budget
from makd.run_folder import (
    Findings,
    OutputFolder,
    describe_environment,
    noting_warnings,
    token_counts,
    unmeasured_metrics,
    write_card,
    write_json,
    write_recipe,
)
from makd.sentence_encoder import copy_companions, origin_of
from makd.source_names import tokenizer_name
from makd.start import identify_start, reads_text
from makd.storage import find_save_dtype
from makd.student.hub import is_student
from makd.tasks import TaskConfig
from makd.weights.shards import read_object
from makd.whole_files import file_digest

logger = logging.getLogger(__name__)


@takes
@keeping_random_state()
@in_first
def factorize_streamed(
    teacher: str,
    data: Data,
    budget: Budget,
    recipe: Recipe | None = None,
    output: str | Path = "runs/student",
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Report:
    """Make the student that `factorize_only` makes, without ever having the teacher or the student in memory.

    What is done stands in a hidden folder beside the output. The same call continues there after a run that was killed.

    Args:
        teacher: hub id, folder, or `package:module/path`, with safetensors.
        data: text to calibrate on; not looked at by solvers that need none.
        budget: how many parameters the student may have.
        recipe: how it is made; None takes the defaults. Vocabulary and depth stay as they are.
        output: folder for the student.
        tokenizer: where the tokenizer is, if not with the teacher; or a tokenizer.
        overwrite: whether a folder that is not empty may be replaced.
        on_progress: called with a `Progress` after each unit of work, for progress bars.

    Returns:
        The measurements that need no whole model, and where the student is.

    Raises:
        MakdError: with what was wrong, which value, and what is allowed.
    """
    recipe = recipe or Recipe()
    check_streamable(recipe.factorize)
    texts = names_of(data) if not isinstance(data, DataConfig) or data.is_named else []  # svd reads none
    named = [teacher, *texts, tokenizer_name(tokenizer)]
    outputs = OutputFolder(Path(output), overwrite=overwrite, inputs=named, kinds=("factorization",))
    with outputs as folder, noting_warnings() as warnings:
        findings = Findings(warnings, unmeasured="the teacher was streamed, and the student never compared with it")
        return _stream(teacher, data, budget, recipe, folder, tokenizer, on_progress, findings)


def _stream(
    teacher: str,
    data: Data,
    budget: Budget,
    recipe: Recipe,
    folder: OutputFolder,
    tokenizer: str | PreTrainedTokenizerBase | None,
    on_progress: OnProgress | None,
    findings: Findings,
) -> Report:
    started = time.perf_counter()
    device = recipe.find_device()
    if recipe.uses_bfloat16:
        warn_slow_bfloat16(device)
    set_seed(recipe.seed)
    with reporting("load", on_progress):
        model, files = load_empty_model(teacher, recipe.head, check_dtype(recipe.dtype))
    factorize = recipe.factorize.for_model(resolve(model))
    needs_text = reads_text(recipe, factorize)
    words = _tokenizer(tokenizer, str(files), needed=needs_text)
    batches = prepare(data, words, model, recipe).calibration if needs_text and words is not None else []
    save_dtype = find_save_dtype(recipe.save_dtype, str(files), check_dtype(recipe.dtype))
    check_stream(model, batches, budget, recipe, folder.path, save_dtype, folder.factorization_bytes)
    before, anatomy = parameter_counts(model, resolve(model)), resolve(model)
    known = {
        "teacher": teacher,
        "teacher's files": _stamps(files),
        "teacher's config": file_digest(files / "config.json"),
    }
    config = read_object(files / "config.json")
    work = Work(
        folder.factorization,
        lambda: identify_start(known, config, budget, recipe, batches),
        anew=folder.overwrite,
    )
    with folder.work() as result:
        student, made = stream_student(
            model, files, budget, factorize, work, result, batches, device, on_progress, save_dtype,
            recipe.layer_teacher,
        )  # fmt: skip
        if words is not None:
            words.save_pretrained(result)
        copy_companions(origin_of(model), result)
        counts = {"teacher": before, "student": parameter_counts(student, anatomy)}
        stored = {"teacher": bytes_on_disk(files), "student": bytes_on_disk(result)}
        metrics = unmeasured_metrics(counts, stored, made, made.lessons)
        metrics |= {"memory": {"peak_bytes": peak_bytes()}, "tokens": token_counts(made, made.lessons)}
        metrics["seconds"] = {**made.seconds, "total": time.perf_counter() - started}
        environment = describe_environment(device, recipe.seed)
        settings = {
            "teacher": teacher,
            "task" if isinstance(data, TaskConfig) else "data": _named(data),
            "recipe": recipe,
            "tokenizer": tokenizer_name(tokenizer),
            "budget": budget,
            "stream": True,
            "output": folder.path,
        }
        write_recipe(result, settings)
        write_json(result / "metrics.json", metrics)
        write_json(result / "environment.json", environment)
        findings.made = made
        findings.write(result, student)
        write_card(
            result, folder.path.name, teacher, type(model).__name__, metrics, environment, "factorize", _named(data),
            kind="factored",
        )  # fmt: skip
    return Report(folder.path, metrics, is_student(student))


def _tokenizer(
    tokenizer: str | PreTrainedTokenizerBase | None, folder: str, needed: bool
) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None where there is none and nothing asks for it."""
    if tokenizer is not None:
        return choose_tokenizer(tokenizer, folder)
    try:
        return choose_tokenizer(None, folder)
    except ModelLoadError as error:
        if needed:
            raise
        logger.warning("The student gets no tokenizer: %s Name one with --tokenizer, or copy its files", error)
        return None


def _named(data: Data) -> DataConfig | TaskConfig | None:
    """What a file can say of the data; None for texts in hand."""
    return None if isinstance(data, list) else DataConfig(path=data) if isinstance(data, str) else data


def _stamps(files: Path) -> dict[str, list[int]]:
    """Size and time of every weight file: enough to see that it is another one, without reading it."""
    found = ((path.name, path.stat()) for path in sorted(files.glob("*.safetensors")))
    return {name: [stamp.st_size, stamp.st_mtime_ns] for name, stamp in found}
