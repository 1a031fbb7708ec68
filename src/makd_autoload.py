"""Where makd is installed, transformers loads students without `import makd`: this file sees to it.

`import torch` ends with a call of `arm`, which packages may ask torch for (entry points of the group `torch.backends`).
It waits for transformers' list of ways to load checkpoints, and enters makd there under a class that imports makd when
the first student is loaded. Until then nothing of makd is imported.

It is no part of the package `makd`, and imports nothing of it: what may be wrong with that (a script called makd.py, a
source folder that was moved away) is an error where a student is loaded, and never in `import torch`.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "makd"
LISTS = "transformers.quantizers.auto"
"""Where transformers lists how checkpoints are loaded whose modules are not those of their architecture."""
LOADS = "transformers.modeling_utils"
"""What looks there; no model is loaded before it is imported."""


def arm() -> None:
    """Have makd entered in transformers' list, now or as soon as it is there. Any moment, any number of times."""
    later = next((name for name in (LISTS, LOADS) if name not in sys.modules), None)
    if later is None:
        enter()
    elif not any(isinstance(finder, Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, Watch(later))


def enter() -> None:
    """Enter makd in transformers' list, unless it is there, or the list has another form than is known here."""
    lists: Any = sys.modules.get(LISTS)
    known: Mapping[str, Any] = getattr(lists, "AUTO_QUANTIZATION_CONFIG_MAPPING", {METHOD: None})
    if METHOD in known or not hasattr(lists, "register_quantization_config"):
        return

    @lists.register_quantization_config(METHOD)
    class WhenAStudentIsLoaded(lists.QuantizationConfigMixin):  # type: ignore[misc]
        """Imports makd, whose own class goes on."""

        @classmethod
        def from_dict(cls, config_dict: Mapping[str, Any], *arguments: Any, **others: Any) -> Any:
            """What a student's `config.json` says of it."""
            importlib.import_module("makd.student.registration")
            config = importlib.import_module("makd.student.config").StudentConfig
            return config.from_dict(config_dict, *arguments, **others)

    quantizers = getattr(lists, "AutoHfQuantizer", None)
    if hasattr(quantizers, "merge_quantization_configs"):
        listen(quantizers)


def listen(quantizers: Any) -> None:
    """Have makd imported before transformers asks which holds: what a student's files say, or what a caller asks for.

    What else there is to ask is answered as ever. makd puts its own answer there; why: `makd.student.registration`.
    """
    answer = quantizers.merge_quantization_configs

    def merge_quantization_configs(quantization_config: Any, *others: Any, **named: Any) -> Any:
        if isinstance(quantization_config, dict) and quantization_config.get("quant_method") == METHOD:
            importlib.import_module("makd.student.registration")
            return quantizers.merge_quantization_configs(quantization_config, *others, **named)
        return answer(quantization_config, *others, **named)

    quantizers.merge_quantization_configs = merge_quantization_configs


class Watch(MetaPathFinder):
    """Finds one module as others find it, and has `enter` called when it has been loaded."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None, but for the module that is waited for."""
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = ThenEnter(self, spec.loader)
        return spec


class ThenEnter(Loader):
    """Another loader, and `enter` after it."""

    def __init__(self, watch: Watch, loader: Loader) -> None:
        self.watch = watch
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The other loader's."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """The other loader's, whose module it is from now on."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.watch in sys.meta_path:
            sys.meta_path.remove(self.watch)
        enter()
