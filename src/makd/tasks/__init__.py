"""Station 2, for tasks: rows with labels from any source, the head that a task needs, and its official metrics."""

from makd.tasks.heads import check_head, load_task_model
from makd.tasks.known import KINDS, TASKS, Kind, KnownTask
from makd.tasks.metrics import METRICS
from makd.tasks.rows import HELD_OUT, TaskRows, read_task
from makd.tasks.settings import TaskConfig
from makd.tasks.task import Task, load_task, tokenize_task

__all__ = [
    "HELD_OUT",
    "KINDS",
    "METRICS",
    "TASKS",
    "Kind",
    "KnownTask",
    "Task",
    "TaskConfig",
    "TaskRows",
    "check_head",
    "load_task",
    "load_task_model",
    "read_task",
    "tokenize_task",
]
