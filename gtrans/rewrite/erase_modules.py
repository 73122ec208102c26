"""Erasure as module surgery: a smaller model of the same class.

Parameters and buffers are cut, and the attributes that repeat their sizes are set anew: those of
torch's own layers by what they mean, those of other classes (`num_heads`, `head_dim`,
`split_size`, ...) by which of them hold a size that changed. Nothing of that is trusted: the
result is run and compared with the erased graph, and only an equal model is returned.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from gtrans.rewrite.erase_graph import GraphErasure, cut_tensors, owner_path
from gtrans.rewrite.fit_attributes import Fit, Inexpressible, record_reference, same_state
from gtrans.rewrite.size_attributes import attributes_read, collect_evidence, find_attributes
from gtrans.runtime.norms import LongerLayerNorm, LongerRMSNorm


@dataclass
class ModuleErasure:
    """Builds a smaller model of the same class.

    Args:
        graph: the erasure, after it has built its graph.
        graph_module: that graph; the result must compute what it does.
    """

    graph: GraphErasure
    graph_module: fx.GraphModule

    def build(self, model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> nn.Module:
        """A smaller copy of a model; the model stays as it is.

        Raises:
            Inexpressible: no setting of its attributes computes what the reference does.
        """
        twin = copy.deepcopy(model)
        twin.zero_grad(set_to_none=True)
        read = attributes_read(twin, lambda m: _run(m, args, kwargs))
        found = find_attributes(twin)
        self._cut(twin)
        self._set_stock_sizes(twin)
        self._replace_norms(twin)
        reference = record_reference(self.graph, self.graph_module, args, kwargs)
        Fit(twin, reference, args, kwargs).run(found, collect_evidence(self.graph), read)
        return twin

    # ------------------------------------------------------------------ steps

    def _cut(self, twin: nn.Module) -> None:
        for path, tensor in cut_tensors(self.graph.structure, self.graph.erased).items():
            owner, _, name = path.rpartition(".")
            try:
                module = twin.get_submodule(owner)
            except AttributeError:
                continue  # a constant of the forward: it has no frozen size to change
            if name in module._parameters and isinstance(tensor, nn.Parameter):
                module._parameters[name] = tensor
            elif name in module._buffers:
                module._buffers[name] = tensor

    def _set_stock_sizes(self, twin: nn.Module) -> None:
        groups: dict[str, int] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for node, edits in self.graph.structure.analysis.context.edits.items():
            for name in ("groups", "num_groups"):
                if name in edits.arguments:
                    groups[owner_path(node)] = self.graph.argument(edits.arguments[name])
            if "normalized_shape" in edits.arguments:
                new = self.graph.argument(edits.arguments["normalized_shape"])
                shapes[owner_path(node)] = tuple(new)
        for path, module in twin.named_modules():
            _set_stock(module, groups.get(path), shapes.get(path))

    def _replace_norms(self, twin: nn.Module) -> None:
        if not self.graph.keep_divisor:
            return
        done: set[str] = set()
        # A builder of its own: building a part forgets what the whole graph was made of.
        builder = GraphErasure(self.graph.structure, self.graph.erased)
        for node, edits in self.graph.structure.analysis.context.edits.items():
            old, new = self.graph.divisors(edits)
            path = owner_path(node)
            if old == new or path in done:
                continue
            done.add(path)
            owner = twin.get_submodule(path)
            made = _longer(owner, old)
            if made is None:
                part = builder.build_part(path)
                if part is None or not path:
                    raise Inexpressible(
                        f"{type(owner).__name__} ({path or 'the model itself'}) averages over an "
                        "erased axis and its class cannot keep the old divisor"
                    )
                made = part
            made.train(owner.training)
            parent, _, name = path.rpartition(".")
            setattr(twin.get_submodule(parent), name, made)


# ---------------------------------------------------------------------- private


def _set_stock(module: nn.Module, groups: int | None, shape: tuple[int, ...] | None) -> None:
    """Brings the size attributes of torch's own layers in line with their parameters."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.groups = groups or module.groups
        first, second = module.weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, (nn.modules.batchnorm._NormBase)):
        tensor = weight if weight is not None else module.running_mean
        if isinstance(tensor, torch.Tensor):
            module.num_features = tensor.shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = groups or module.num_groups
        if isinstance(weight, torch.Tensor):
            module.num_channels = weight.shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and shape is not None:
        module.normalized_shape = shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
    elif isinstance(module, nn.RNNBase):
        module.hidden_size = module.get_parameter("weight_hh_l0").shape[1]
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    elif isinstance(module, nn.RNNCellBase):
        module.hidden_size = module.weight_hh.shape[1]
        module.input_size = module.weight_ih.shape[1]


def _longer(module: nn.Module, divisor: int) -> nn.Module | None:
    """The norm with its old divisor, if the module is torch's own."""
    made: LongerLayerNorm | LongerRMSNorm
    if type(module).forward is nn.LayerNorm.forward and isinstance(module, nn.LayerNorm):
        made = LongerLayerNorm(module.normalized_shape, divisor, module.eps, False)
        made.bias = module.bias
    elif type(module).forward is nn.RMSNorm.forward and isinstance(module, nn.RMSNorm):
        made = LongerRMSNorm(module.normalized_shape, divisor, module.eps, False)
    else:
        return None
    made.elementwise_affine = module.elementwise_affine
    made.weight = module.weight
    return made


def _run(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    with same_state(model):
        return model(*args, **kwargs)
