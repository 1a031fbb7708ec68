"""How vLLM holds and multiplies a factored linear, alone or merged with others, on one device or split over several.

Weights come by the names in a student's files. So a layer has, while it is loaded, a parameter for each of these names
(`weight`: identities and dense shards; `reduce.weight`; `expand.weight`; `expand.bias`), and their loaders put what
comes where it is multiplied. Which rows of B or columns of A a process keeps is decided by vLLM's own loaders, as for a
dense weight: A is split only where the input is, and B only where the output is.

Where the input is split, each process has A x of its part. The sum of these is made before B, over `rank` numbers for
each token in the place of `out`; it is the same sum, since B is linear. Where a model makes the sum itself, later, it
gets each process's part of the output.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import LinearMethodBase, RowParallelLinear, UnquantizedLinearMethod

from makd.anatomy.stand_in import NUMBER
from makd.errors import ModelLoadError, UnsupportedModelError
from makd.serving.merged import WAY_OUT, MergedLinear

SHARD_IDS = {"q": 0, "k": 1, "v": 2}
"""What vLLM calls the shards of merged queries, keys and values; others it counts."""


class _Matrix(nn.Module):
    """A matrix (out, in), as vLLM's method for dense linears takes one."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter((out_features, in_features), dtype)
        self.bias: nn.Parameter | None = None


class FactoredLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The weights and the product of one layer."""

    def __init__(self, merged: MergedLinear, identity: int, check_model: Callable[[], None]) -> None:
        """For one layer.

        Args:
            merged: what stands in it.
            identity: of the student.
            check_model: called when the weights were read.
        """
        self.merged = merged
        self.identity = identity
        self.check_model = check_model
        self.dense = UnquantizedLinearMethod()
        """What multiplies a matrix on this platform."""
        self.loaded: set[tuple[str, int]] = set()
        """What has come for which shard."""
        self.sizes: list[int] = []
        """Outputs of each shard, in this process."""
        self.reduces_inside = False
        """Whether the sum over processes is made of the products A x."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for the factors, and parameters for what comes.

        Raises:
            UnsupportedModelError: vLLM has merged other linears than the student's, or splits them in an unknown way.
        """
        shards = self.merged.shards
        if len(shards) not in (1, len(output_partition_sizes)):
            raise UnsupportedModelError(
                f"vLLM has {len(output_partition_sizes)} parts in {self._name()!r}, and the student "
                f"{len(shards)} linears. {WAY_OUT}"
            )
        if input_size_per_partition != input_size and not isinstance(layer, RowParallelLinear):
            raise UnsupportedModelError(f"{type(layer).__name__} splits the input of {self._name()!r}. {WAY_OUT}")
        self.sizes = [sum(output_partition_sizes)] if len(shards) == 1 else list(output_partition_sizes)
        layer.reduce = _Matrix(sum(self.merged.ranks), input_size_per_partition, params_dtype)
        layer.blocks = nn.ModuleList(
            _Matrix(
                sum(self.sizes[block.first : block.first + block.count]),
                input_size_per_partition if block.product is None else self.merged.ranks[block.product],
                params_dtype,
            )
            for block in self.merged.blocks
        )
        layer.expand = nn.Module()
        layer.expand.weight = _parameter((0,), params_dtype)
        layer.expand.bias = _parameter((sum(self.sizes),), params_dtype)
        layer.weight = _parameter((0,), params_dtype)
        for parameter, load in (
            (layer.weight, self._load_weight),
            (layer.reduce.weight, self._load_reduce),
            (layer.expand.weight, self._load_expand),
            (layer.expand.bias, self._load_bias),
        ):
            parameter.weight_loader = _loader(load, layer)
        layer.expand.weight.output_dim = layer.expand.bias.output_dim = 0  # models that reorder rows ask for it
        if any(shard.rank is None for shard in shards):
            layer.weight.output_dim = 0

    def _load_weight(self, layer: Any, _: Tensor, came: Tensor, shard_id: Any) -> None:
        """An identity, or a dense weight."""
        index, shard = self._shard(shard_id)
        if shard.rank is None:
            rows = torch.empty(sum(self.sizes), layer.reduce.weight.shape[1], dtype=layer.reduce.weight.dtype)
            self._place(layer, index, _split_by_vllm(layer, rows, came, shard_id, output_dim=0))
        elif tuple(came.shape) != NUMBER or int(came) != self.identity:
            found = f"{int(came):016x}" if came.numel() == 1 else f"a weight of shape {tuple(came.shape)}"
            raise ModelLoadError(
                f"The weights of {shard.name!r} are of student {found}, config.json of {self.identity:016x}. {_AGAIN}"
            )
        self.loaded.add(("weight", index))

    def _load_reduce(self, layer: Any, parameter: Tensor, came: Tensor, shard_id: Any) -> None:
        """An A: whole, but where the input is split."""
        index, shard = self._shard(shard_id)
        if index not in self.merged.leaders:
            raise ModelLoadError(f"The weight files have an A for {shard.name!r}, and config.json has none. {_AGAIN}")
        self._check_rank(shard.name, "reduce", came.shape[0], shard.rank)
        place = self.merged.leaders.index(index)
        first = sum(self.merged.ranks[:place])
        rows = parameter.data[first : first + self.merged.ranks[place]]
        if isinstance(layer, RowParallelLinear):
            came = _split_by_vllm(layer, torch.empty_like(rows), came, None, input_dim=1)
        if came.shape != rows.shape:
            raise ModelLoadError(f"{shard.name}.reduce has {came.shape[1]} inputs, vLLM {rows.shape[1]}. {_AGAIN}")
        rows.copy_(came)
        self.loaded.add(("reduce", index))

    def _load_expand(self, layer: Any, _: Tensor, came: Tensor, shard_id: Any) -> None:
        """A B: split where the output is."""
        index, shard = self._shard(shard_id)
        self._check_rank(shard.name, "expand", came.shape[1], shard.rank)
        rows = torch.empty(sum(self.sizes), came.shape[1], dtype=layer.reduce.weight.dtype)
        self._place(layer, index, _split_by_vllm(layer, rows, came, shard_id, output_dim=0))
        self.loaded.add(("expand", index))

    def _load_bias(self, layer: Any, parameter: Tensor, came: Tensor, shard_id: Any) -> None:
        """The bias of a factored shard."""
        index, _ = self._shard(shard_id)
        rows = self._rows(index)
        whole = _split_by_vllm(layer, torch.empty_like(parameter.data), came, shard_id, output_dim=0)
        parameter.data[rows].copy_(whole[rows])
        self.loaded.add(("bias", index))

    def _place(self, layer: Any, index: int, whole: Tensor) -> None:
        """Put the rows of one shard, out of all, into its block."""
        for block, matrix in zip(self.merged.blocks, layer.blocks, strict=True):
            if block.first <= index < block.first + block.count:
                first = sum(self.sizes[block.first : index])
                matrix.weight.data[first : first + self.sizes[index]].copy_(whole[self._rows(index)])

    def process_weights_after_loading(self, layer: Any) -> None:
        """See that all has come, and give each matrix the form that this platform multiplies.

        Raises:
            ModelLoadError: something has not come.
            UnsupportedModelError: factors of other layers have no place.
        """
        self.check_model()
        self._check_loaded(layer)
        for index, shard in enumerate(self.merged.shards):
            if layer.bias is not None and shard.rank is not None:
                layer.bias.data[self._rows(index)].copy_(layer.expand.bias.data[self._rows(index)])
        del layer.expand
        first = 0
        for matrix in layer.blocks:
            rows = slice(first, first + len(matrix.weight))
            first = rows.stop
            if layer.bias is not None:
                matrix.bias = nn.Parameter(layer.bias.data[rows].clone(), requires_grad=False)
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1 and layer.reduce_results:
            self.reduces_inside = True
            layer.reduce_results = False
        for matrix in (layer.reduce, *layer.blocks):
            self.dense.process_weights_after_loading(matrix)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """B (A x), with a bias where `layer` wants one."""
        has_bias = bias is not None

        def reduce(inputs: Tensor) -> Tensor:
            product: Tensor = self.dense.apply(layer.reduce, inputs)
            return tensor_model_parallel_all_reduce(product) if self.reduces_inside else product

        if self.reduces_inside:  # all processes have the whole output then, not only the first one's with a bias
            has_bias = layer.bias is not None and not layer.skip_bias_add
        expands = [
            lambda rows, matrix=matrix: self.dense.apply(matrix, rows, matrix.bias if has_bias else None)
            for matrix in layer.blocks
        ]
        return self.merged.multiply(x, reduce, expands)

    def _check_loaded(self, layer: Any) -> None:
        for index, shard in enumerate(self.merged.shards):
            needed = ["weight"]
            if shard.rank is not None:
                needed += ["expand"] + ["reduce"] * (index in self.merged.leaders)
                needed += ["bias"] * (layer.bias is not None)
                if layer.bias is None and ("bias", index) in self.loaded:
                    raise ModelLoadError(f"vLLM's {shard.name!r} has no bias; the weight files have one. {_AGAIN}")
            missing = [what for what in needed if (what, index) not in self.loaded]
            if missing:
                raise ModelLoadError(f"The weight files lack {missing[0]!r} of {shard.name!r}. {_AGAIN}")

    def _check_rank(self, name: str, factor: str, found: int, rank: int | None) -> None:
        if found != rank:
            raise ModelLoadError(
                f"{name}.{factor} has rank {found} in the weight files; config.json says "
                f"{'that it is dense' if rank is None else rank}. {_AGAIN}"
            )

    def _shard(self, shard_id: Any) -> tuple[int, Any]:
        """The shard that vLLM calls `shard_id`, which is None where weights are merged in the files, too."""
        index = SHARD_IDS.get(shard_id, shard_id) if isinstance(shard_id, str) else shard_id
        if len(self.merged.shards) == 1:
            index = 0 if index is None else index
        if not isinstance(index, int) or not 0 <= index < len(self.merged.shards):
            raise UnsupportedModelError(f"vLLM calls a part of {self._name()!r} {shard_id!r}. {WAY_OUT}")
        return index, self.merged.shards[index]

    def _rows(self, index: int) -> slice:
        first = sum(self.sizes[:index])
        return slice(first, first + self.sizes[index])

    def _name(self) -> str:
        return self.merged.shards[0].name


_AGAIN = "Weights and config are of different students: copy the student's folder again, whole."


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def _loader(load: Callable[..., None], layer: Any) -> Callable[..., None]:
    def loader(parameter: Tensor, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        load(layer, parameter, loaded_weight, loaded_shard_id)

    return loader


def _split_by_vllm(layer: Any, room: Tensor, came: Tensor, shard_id: Any, **dimension: int) -> Tensor:
    """What vLLM's own loader of `layer` puts into `room` of a weight that came: this process's part, in its place."""
    parameter = nn.Parameter(room, requires_grad=False)
    for name, value in dimension.items():
        setattr(parameter, name, value)
    layer.weight_loader(parameter, came, *(() if shard_id is None else (shard_id,)))
    return parameter.data
