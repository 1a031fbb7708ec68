"""Parts of benchmarks/distillation.py, importable by the interpreter of other tools as well."""
