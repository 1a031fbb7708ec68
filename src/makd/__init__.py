"""makd: smaller copies of language models, by low-rank factors and multi-aspect distillation.

    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), calibration=batches)
    makd.DistillTrainer(student, teacher, plan="full", args=..., train_dataset=...).train()
    student.save_pretrained("student")      # AutoModel.from_pretrained loads it wherever makd is installed

Importing this package sees to it that transformers loads students; where it is installed, `makd_autoload` does so
unasked. The rest is imported when it is first used, torch and transformers too: `makd --help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

import makd_autoload

if TYPE_CHECKING:
    from makd import aspects
    from makd.ablation import Ablation, ablate
    from makd.anatomy import Anatomy, Role, resolve
    from makd.aspects import Completions, Plan, Term
    from makd.cache import CacheConfig, TeacherCache
    from makd.caching import CacheReport, build_cache
    from makd.capture import inspect
    from makd.comparison import Experiment, LanguageConfig, MethodConfig, SearchConfig, compare
    from makd.config import CalibrationConfig, EvaluationConfig, FinetuneRecipe, Recipe, Stage
    from makd.data import DataConfig
    from makd.distill import DistillTrainer, LayerTeacher, LayerwiseConfig, TrainingConfig, teach_layers_
    from makd.efforts import effort
    from makd.errors import MakdError
    from makd.evaluation.answers import Answers, answer
    from makd.evaluation.fidelity import fidelity
    from makd.evaluation.fingerprint import fingerprint
    from makd.evaluation.instructions import InstructionsConfig
    from makd.evaluation.perplexity import perplexity
    from makd.evaluation.rolling import RollingPerplexity, rolling_perplexity
    from makd.evaluation.speed import BenchConfig
    from makd.factorization.factorize import factorize
    from makd.factorization.outcome import FactorizeReport
    from makd.factorization.settings import FactorizeConfig
    from makd.finetuning import finetune
    from makd.forecasting import RunForecast, forecast
    from makd.pipeline import Report, compress, evaluate
    from makd.progress import Progress
    from makd.ranks.budget import Budget
    from makd.speed import BenchReport, bench
    from makd.streaming import factorize_streamed
    from makd.student.adapters import adapter_targets
    from makd.student.folding import fold
    from makd.student.linear import LowRankLinear
    from makd.tasks import TaskConfig, load_task

_HOME = {
    "Ablation": "makd.ablation",
    "Anatomy": "makd.anatomy",
    "Answers": "makd.evaluation",
    "BenchConfig": "makd.evaluation.speed",
    "BenchReport": "makd.speed",
    "Budget": "makd.ranks.budget",
    "CacheConfig": "makd.cache",
    "CacheReport": "makd.caching",
    "CalibrationConfig": "makd.config",
    "Completions": "makd.aspects",
    "DataConfig": "makd.data",
    "DistillTrainer": "makd.distill",
    "EvaluationConfig": "makd.config",
    "Experiment": "makd.comparison",
    "FactorizeConfig": "makd.factorization.settings",
    "FactorizeReport": "makd.factorization.outcome",
    "FinetuneRecipe": "makd.config",
    "InstructionsConfig": "makd.evaluation",
    "LanguageConfig": "makd.comparison",
    "LayerTeacher": "makd.distill",
    "LayerwiseConfig": "makd.distill",
    "LowRankLinear": "makd.student.linear",
    "MakdError": "makd.errors",
    "MethodConfig": "makd.comparison",
    "Plan": "makd.aspects",
    "Progress": "makd.progress",
    "Recipe": "makd.config",
    "Report": "makd.pipeline",
    "Role": "makd.anatomy",
    "RunForecast": "makd.forecasting",
    "SearchConfig": "makd.comparison",
    "Stage": "makd.config",
    "TaskConfig": "makd.tasks",
    "TeacherCache": "makd.cache",
    "Term": "makd.aspects",
    "TrainingConfig": "makd.distill",
    "RollingPerplexity": "makd.evaluation",
    "ablate": "makd.ablation",
    "adapter_targets": "makd.student.adapters",
    "answer": "makd.evaluation",
    "aspects": "makd",
    "bench": "makd.speed",
    "build_cache": "makd.caching",
    "compare": "makd.comparison",
    "compress": "makd.pipeline",
    "effort": "makd.efforts",
    "evaluate": "makd.pipeline",
    "factorize": "makd.factorization.factorize",
    "factorize_streamed": "makd.streaming",
    "fidelity": "makd.evaluation",
    "finetune": "makd.finetuning",
    "fingerprint": "makd.evaluation",
    "fold": "makd.student.folding",
    "forecast": "makd.forecasting",
    "inspect": "makd.capture",
    "load_task": "makd.tasks",
    "perplexity": "makd.evaluation",
    "teach_layers_": "makd.distill",
    "resolve": "makd.anatomy",
    "rolling_perplexity": "makd.evaluation",
}
"""Public name -> the module that it lives in."""

__all__ = [
    "Ablation",
    "Anatomy",
    "Answers",
    "BenchConfig",
    "BenchReport",
    "Budget",
    "CacheConfig",
    "CacheReport",
    "CalibrationConfig",
    "Completions",
    "DataConfig",
    "DistillTrainer",
    "EvaluationConfig",
    "Experiment",
    "FactorizeConfig",
    "FactorizeReport",
    "FinetuneRecipe",
    "InstructionsConfig",
    "LanguageConfig",
    "LayerTeacher",
    "LayerwiseConfig",
    "LowRankLinear",
    "MakdError",
    "MethodConfig",
    "Plan",
    "Progress",
    "Recipe",
    "Report",
    "Role",
    "RollingPerplexity",
    "RunForecast",
    "SearchConfig",
    "Stage",
    "TaskConfig",
    "TeacherCache",
    "Term",
    "TrainingConfig",
    "ablate",
    "adapter_targets",
    "answer",
    "aspects",
    "bench",
    "build_cache",
    "compare",
    "compress",
    "effort",
    "evaluate",
    "factorize",
    "factorize_streamed",
    "fidelity",
    "finetune",
    "fingerprint",
    "fold",
    "forecast",
    "inspect",
    "load_task",
    "perplexity",
    "resolve",
    "rolling_perplexity",
    "teach_layers_",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'makd' has no attribute {name!r}")
    home = _HOME[name]
    value = importlib.import_module("makd.aspects") if home == "makd" else getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


makd_autoload.arm()
