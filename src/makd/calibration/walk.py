"""Station 3, the heart of it: a walk through a model's layers, of which one at a time need be in memory.

    up:    layer by layer, the hidden states of all batches, kept in a store
    down:  layer by layer from the last, each run again from its stored input, forward and backward: the moments of what
           its linears read and of the gradients at their outputs are there together, and are handed out

Layers come from a model in memory or from files (`source`), states go to memory or to disk (`store`). Moments are of
one layer at a time: what is made of them is made before the walk goes on. What the store has is not done again, so a
walk that was stopped goes on at the layer where it was.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, ExpertStack, Layer, linear_shape
from makd.anatomy.batches import model_inputs
from makd.anatomy.key_cache import without_cache
from makd.anatomy.sizes import embedding_shape
from makd.anatomy.tokens import by_token
from makd.calibration import entries
from makd.calibration.entries import Entry, of_batch, teacher_states
from makd.calibration.experts import ExpertMoments, ExpertWatcher, check_experts_reached
from makd.calibration.frame import Frame
from makd.calibration.gradients import GradientWatcher
from makd.calibration.moments import InputMoments
from makd.calibration.probes import Probes
from makd.calibration.replay import Calls, NotLayerByLayer, run_layer
from makd.calibration.source import LayerSource
from makd.calibration.statistics import InputWatcher, check_reached
from makd.calibration.store import Store, choose_store
from makd.errors import DataError, NumericsError
from makd.progress import OnProgress, Progress
from makd.weights.finite import is_finite

Batches = Sequence[Mapping[str, Tensor]]
SCRATCH_WIDTHS = 10
"""Hidden states of the whole text that are kept beside the store's, about, while a layer of the student is fitted."""


@dataclass(frozen=True)
class LayerMoments:
    """What calibration found of some linears."""

    linears: tuple[str, ...]
    inputs: Mapping[str, InputMoments] = field(default_factory=dict)
    """Linear -> moments of what it reads; linears that read the same tensor share one object."""
    gradients: Mapping[str, InputMoments] = field(default_factory=dict)
    """Linear, or stack of experts -> moments of the gradients at its output, at those of all experts together."""
    experts: Mapping[str, ExpertMoments] = field(default_factory=dict)
    """Stack of experts -> moments of what each of them reads."""
    stacks: tuple[ExpertStack, ...] = ()
    """The stacks of experts that these are of, besides the linears."""


class Walk:
    """A walk through the layers of a model with a text."""

    def __init__(
        self,
        source: LayerSource,
        anatomy: Anatomy,
        batches: Batches,
        store: Store,
        seed: int = 0,
        backward_tokens: int | None = None,
        whole: "Walk | None" = None,
    ) -> None:
        """Note what layers are called with, and keep the hidden states that enter the first.

        Args:
            source: of the model, in eval mode, and its weights.
            anatomy: of the model.
            batches: model inputs; labels are not looked at.
            store: keeps hidden states and gradients.
            seed: of the probes whose gradients go down.
            backward_tokens: how many tokens go down again, in batches taken by chance; None is all.
            whole: through the same model with layers that this one does without, after `up`; None if there are none.

        Raises:
            DataError: there are no batches, or one is all padding.
            NumericsError: hidden states of real tokens hold NaN or infinity.
            NotLayerByLayer: the model has two stacks or shared layers, or works on states between layers.
        """
        if not batches:
            raise DataError("Calibration needs at least one batch; it got none. Is the data empty?")
        self.source, self.model, self.anatomy = source, source.model, anatomy
        self.batches, self.store, self.seed, self.whole = batches, store, seed, whole
        self.scratch = choose_store("auto", SCRATCH_WIDTHS * state_bytes(batches, source.model))
        """What is kept while one layer is worked on, for nobody who comes later."""
        self.backward = _some(batches, backward_tokens, seed)
        """Batches that go down."""
        self.frame = Frame(source, anatomy)
        self.calls: list[Calls] = []
        with self.frame.at_hand():
            for index, batch in enumerate(batches):
                calls = self.frame.enter(batch)
                _check(calls, calls.entering, f"enter {anatomy.layers[0].module}")
                self._keep(teacher_states(0), index, calls.entering)
                self.calls.append(Calls(calls.real, calls.arguments, torch.empty(0), calls.handed))
        store.mark(teacher_states(0))

    def states(self, layer: int, batch: int) -> Tensor:
        """Hidden states that enter a layer of the teacher with all its layers, (batch, tokens, hidden).

        They are what a student's are to be; those of a walk without some layers lack what these do.
        """
        return (self.whole or self)._own_states(layer, batch)

    def _own_states(self, layer: int, batch: int) -> Tensor:
        """Hidden states that enter a layer of the model that is walked through."""
        return self.store.read(of_batch(teacher_states(layer), batch), self.source.device)["hidden"]

    @torch.no_grad()
    def up(self, progress: OnProgress, keep: bool = True, watch: bool = False) -> Iterator[LayerMoments]:
        """The hidden states that enter every layer, and leave the last, into the store.

        Args:
            progress: called with a `Progress` after each batch.
            keep: whether the states of a layer are wanted after the next has them.
            watch: whether moments of what linears read are handed out, layer by layer; else nothing is.

        Raises:
            NumericsError: hidden states of real tokens hold NaN or infinity.
        """
        batch_progress = _BatchProgress(progress, "calibrate", len(self.anatomy.layers), len(self.batches))
        for layer in self.anatomy.layers:
            here, there = teacher_states(layer.index), teacher_states(layer.index + 1)
            if not self.store.is_marked(there):
                moments: dict[str, InputMoments] = {}
                experts: dict[str, ExpertMoments] = {}
                stacks = self.anatomy.stacks_of(layer)
                with self.source.layer(layer), ExitStack() as hooks:
                    watcher = InputWatcher(self.model, self.anatomy, moments)
                    expert_watcher = ExpertWatcher(self.model, self.anatomy, experts)
                    for name in layer.linears if watch else ():
                        hooks.callback(self.model.get_submodule(name).register_forward_hook(watcher.hook(name)).remove)
                    hooks.enter_context(expert_watcher.watching(stacks if watch else ()))
                    for index, (batch, calls) in enumerate(zip(self.batches, self.calls, strict=True)):
                        watcher.start(batch)
                        expert_watcher.start(batch)
                        hidden = run_layer(self.model, layer, calls, self._own_states(layer.index, index))
                        _check(calls, hidden, f"leave {layer.module}")
                        self._keep(there, index, hidden)
                        batch_progress.report(layer.index, index + 1)
                    if watch:
                        check_reached(layer.linears, moments)
                        check_experts_reached(stacks, experts)
                        yield LayerMoments(layer.linears, moments, experts=experts, stacks=stacks)
                self.store.mark(there)
            else:
                batch_progress.report(layer.index, len(self.batches))
            if not keep:
                self.store.remove(here)

    @torch.no_grad()
    def check_whole_model(self) -> None:
        """Refuse a model that, run whole on the first batch, ends in other states than the walk. Comes after `up`.

        Raises:
            NotLayerByLayer: it does not: something that this walk does not see works between layers.
        """
        last, found = self.anatomy.layers[-1], list[Tensor]()

        def note(_module: object, _inputs: object, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = self.model.get_submodule(last.module).register_forward_hook(note)
        try:
            with without_cache(self.model):
                self.model(**model_inputs(self.batches[0], self.source.device))
        finally:
            handle.remove()
        real = self.calls[0].real
        ours, theirs = (states[real].float() for states in (self._own_states(last.index + 1, 0), found[0]))
        tolerance = 1e-3 if found[0].dtype in (torch.float32, torch.float64) else 5e-2
        if not float((ours - theirs).norm()) <= tolerance * float(theirs.norm()):
            raise NotLayerByLayer(
                f"{type(self.model).__name__}, run whole, ends in other hidden states than its layers one after the "
                "other: it does something else between them."
            )

    def head_inputs(self, head: str) -> InputMoments:
        """Moments of what a linear behind the last layer reads. Comes after `up`."""
        moments: dict[str, InputMoments] = {}
        watcher = InputWatcher(self.model, self.anatomy, moments)
        with torch.no_grad(), self.frame.at_hand():
            handle = self.model.get_submodule(head).register_forward_hook(watcher.hook(head))
            try:
                for index, (batch, calls) in enumerate(zip(self.batches, self.calls, strict=True)):
                    watcher.start(batch)
                    self.frame.leave(batch, calls, self._own_states(len(self.anatomy.layers), index))
            finally:
                handle.remove()
        check_reached((head,), moments)
        return moments[head]

    def down(self, progress: OnProgress, inputs: bool = True) -> Iterator[LayerMoments]:
        """The moments of each layer, from the last to the first. Comes after `up`.

        When the next is asked for, what was made of a layer counts as kept: it is not handed out again, by this walk or
        by one that goes on with its store.

        Args:
            progress: called with a `Progress` after each batch.
            inputs: whether moments of what linears read are wanted besides those of gradients.
        """
        count = len(self.anatomy.layers)
        # the way round the end counts as a layer: probes are drawn and sent back there
        batch_progress = _BatchProgress(progress, "gradients", count + 1, len(self.backward))
        if not any(self.store.is_marked(entries.gradients(layer)) for layer in range(count + 1)):
            self._turn(count, batch_progress)
            self.store.mark(entries.gradients(count))
        for layer in reversed(self.anatomy.layers):
            here, above = entries.gradients(layer.index), entries.gradients(layer.index + 1)
            if self.store.is_marked(above):
                with self.source.layer(layer):
                    yield self._backward(
                        layer, above, here, inputs, partial(batch_progress.report, count - layer.index)
                    )
                self.store.mark(here)
                self.store.unmark(above)
                self.store.remove(above)
            else:
                batch_progress.report(count - layer.index, len(self.backward))

    def embedding_gradients(self, embeddings: Mapping[str, int]) -> dict[str, InputMoments]:
        """Moments of the gradients at the outputs of embeddings. Comes after `down`.

        Args:
            embeddings: modules before the first layer -> features of their outputs.
        """
        moments = {name: InputMoments(features, self.source.device) for name, features in embeddings.items()}
        watcher = GradientWatcher(self.anatomy, moments, tuple(moments))
        with self.frame.at_hand(), ExitStack() as hooks:
            for name in moments:
                hooks.callback(self.model.get_submodule(name).register_forward_hook(watcher.hook(name)).remove)
            for index in self.backward:
                batch, gradients = self.batches[index], self._gradients(entries.gradients(0), index)
                watcher.start(model_inputs(batch, self.source.device), len(gradients))
                with torch.enable_grad():
                    entering = self.frame.first_states(batch)
                for watcher.probe, gradient in enumerate(gradients):
                    torch.autograd.backward(entering, gradient, retain_graph=watcher.probe + 1 < len(gradients))
        watcher.finish()
        return moments

    def _turn(self, count: int, batch_progress: "_BatchProgress") -> None:
        """Gradients of every probe at the hidden states that leave the last layer."""
        with self.frame.at_hand():
            with self.frame.without_layers(self.calls[0]):
                probes = Probes(self.model, self.anatomy, self.seed)
            for done, index in enumerate(self.backward, start=1):
                batch, calls = self.batches[index], self.calls[index]
                leaf = self._own_states(count, index).detach().requires_grad_()
                run = partial(self.frame.leave, batch, calls, leaf)
                drawn = probes.draw(model_inputs(batch, self.source.device), run)
                gradients = [
                    torch.autograd.grad(tensor, leaf, gradient, retain_graph=number + 1 < probes.count)[0]
                    for number, (tensor, gradient) in enumerate(drawn)
                ]
                self.store.write(of_batch(entries.gradients(count), index), _numbered(gradients))
                batch_progress.report(0, done)

    def _backward(
        self, layer: Layer, above: Entry, here: Entry, inputs: bool, on_batch: Callable[[int], None]
    ) -> LayerMoments:
        """Run a layer again, forward and backward: gradients at what enters it into the store, moments handed out."""
        linears, stacks = layer.linears, self.anatomy.stacks_of(layer)
        read: dict[str, InputMoments] = {}
        experts: dict[str, ExpertMoments] = {}
        features = {name: linear_shape(self.model.get_submodule(name))[0] for name in linears}
        features |= {stack.name: stack.out_features for stack in stacks}
        given = {name: InputMoments(outputs, self.source.device) for name, outputs in features.items()}
        watcher, gradient_watcher = InputWatcher(self.model, self.anatomy, read), GradientWatcher(self.anatomy, given)
        expert_watcher = ExpertWatcher(self.model, self.anatomy, experts)
        with ExitStack() as hooks:
            hooks.enter_context(expert_watcher.watching(stacks, inputs, gradient_watcher.watch_expert))
            for name in linears:
                module = self.model.get_submodule(name)
                if inputs:
                    hooks.callback(module.register_forward_hook(watcher.hook(name)).remove)
                hooks.callback(module.register_forward_hook(gradient_watcher.hook(name)).remove)
            for done, index in enumerate(self.backward, start=1):
                batch, calls = self.batches[index], self.calls[index]
                gradients = self._gradients(above, index)
                watcher.start(batch)
                expert_watcher.start(batch)
                gradient_watcher.start(model_inputs(batch, self.source.device), len(gradients))
                leaf = self._own_states(layer.index, index).detach().requires_grad_()
                with torch.enable_grad():
                    output = run_layer(self.model, layer, calls, leaf.clone())  # it may change what it is given
                found: list[Tensor] = []
                for gradient_watcher.probe, gradient in enumerate(gradients):
                    # to everything that is watched, not just to what leads to the states: DeBERTa's linears read
                    # relative positions too
                    retain = gradient_watcher.probe + 1 < len(gradients)
                    torch.autograd.backward(output, gradient, retain_graph=retain)
                    assert leaf.grad is not None
                    found.append(leaf.grad)
                    leaf.grad = None
                self.store.write(of_batch(here, index), _numbered(found))
                on_batch(done)
        gradient_watcher.finish()
        if inputs:
            check_reached(linears, read)
            check_experts_reached(stacks, experts)
        return LayerMoments(linears, read, given, experts, stacks)

    def _gradients(self, entry: Entry, batch: int) -> list[Tensor]:
        found = self.store.read(of_batch(entry, batch), self.source.device)
        return [found[name] for name in sorted(found)]

    def _keep(self, entry: Entry, batch: int, hidden: Tensor) -> None:
        self.store.write(of_batch(entry, batch), {"hidden": hidden})


class _BatchProgress:
    """Reports progress over layers x batches."""

    def __init__(self, progress: OnProgress, what: str, layers: int, batches: int) -> None:
        self.progress, self.what, self.layers, self.batches = progress, what, layers, batches
        progress(Progress(what, 0, layers * batches, "batches"))

    def report(self, before: int, done: int) -> None:
        """So many layers are behind, and so many batches of this one."""
        finished = before * self.batches + done
        self.progress(Progress(self.what, finished, self.layers * self.batches, "batches"))


def state_bytes(batches: Batches, model: PreTrainedModel) -> int:
    """Bytes of the hidden states of all batches, between two layers."""
    width = embedding_shape(model)[1]
    return sum(batch["input_ids"].numel() for batch in batches) * width * model.dtype.itemsize


def _some(batches: Batches, tokens: int | None, seed: int) -> tuple[int, ...]:
    """Batches with about so many tokens together, at least one; by chance, since batches may be in any order."""
    total = sum(batch["input_ids"].numel() for batch in batches)
    share = 1.0 if tokens is None else min(1.0, tokens / total)
    wanted = max(1, math.ceil(len(batches) * share))
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed), device="cpu")
    return tuple(sorted(order[:wanted].tolist()))


def _check(calls: Calls, hidden: Tensor, where: str) -> None:
    real = calls.real.to(hidden.device)
    if not is_finite(by_token(hidden, real, f"What is to {where}")[real]):
        raise NumericsError(
            f"The hidden states that {where} hold NaN or infinity during calibration. The teacher's weights or the "
            "data make it overflow: use bfloat16 or float32 instead of float16, and check the teacher's outputs."
        )


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{number:02}": tensor for number, tensor in enumerate(tensors)}
