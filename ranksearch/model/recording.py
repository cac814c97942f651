"""What one forward pass shows of a net's layers: how often each is called and on how much, and what no lowered layer could take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from ranksearch.lowering import LayerSpec
from ranksearch.lowering.spec import Ints
from ranksearch.model.as_plain import AsPlain, as_plain, weight_norm_hook
from ranksearch.model.bare import is_lazy
from ranksearch.model.experts import are_experts, tokens_of_each
from ranksearch.model.undisturbed import undisturbed

Use = tuple[Ints, int]
"""(size of one map or extents of its rows, number of maps)"""


class Elsewhere(TorchDispatchMode):
    """Notes whose weights are used outside of their own calls, where a lowered layer would have to compute its weight anew."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        """The layers that are being called, outermost first."""
        self.found: set[int] = set()
        self._holders = defaultdict[int, list[nn.Module]](list)
        for module in model.modules():
            for source in _sources(module):
                self._holders[id(source)].append(module)

    def reads(self, module: nn.Module) -> bool:
        """Whether something else computed with the weight of `module`."""
        return any(id(source) in self.found for source in _sources(module))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            holders = self._holders.get(id(value))
            if holders is not None and not any(holder in self.running for holder in holders):
                self.found.add(id(value))
        return func(*args, **(kwargs or {}))


def _sources(module: nn.Module) -> tuple[Tensor, ...]:
    """The parameters that a Conv or Linear computes with, its bias aside; () for other modules and lazy ones.

    Also under old weight norm, which computes with them before the layer is called and leaves others the weight.
    """
    if LayerSpec.stated(module) is None or any(map(is_lazy, module.parameters())) or weight_norm_hook(module):
        return ()
    return tuple(p for p in module.parameters() if p.dim() > 1)


class Recorder:
    """What one forward pass shows of a model's layers: uses by module, calls that no chain could take, BN layers behind layers."""

    def __init__(self, model: nn.Module, batch: int, elsewhere: Elsewhere) -> None:
        self.elsewhere = elsewhere
        self.uses: dict[int, list[Use]] = defaultdict(list)
        self.odd: dict[int, str] = {}
        self.crossing: set[int] = set()
        """Attentions whose query, key and value are not one tensor."""
        self.tokens_of: dict[int, list[list[int]]] = defaultdict(list)
        """Fused experts -> for every call, how many tokens each expert gets."""
        self.norm_behind: dict[int, nn.Module] = {}
        self._batch = batch
        self._own = {id(m): found for m in model.modules() if isinstance(found := _own(m), AsPlain)}
        self._outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # the tensors are held, so that no id is given twice
        self._hooks = []
        for module in model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _spec(self, module: nn.Module) -> LayerSpec | None:
        own = self._own.get(id(module))
        return LayerSpec.of(module) if own is None else own.spec

    def _tokens(self, x: Tensor) -> Use:
        """Rows [.., S]: with the batch in front, or as many to each sample as there are, or one by one."""
        if x.dim() > 1 and x.shape[0] == self._batch:
            return tuple(x.shape[1:-1]), self._batch
        return self._spread(x.numel() // x.shape[-1] if x.shape[-1] else 0)

    def _spread(self, rows: int) -> Use:
        return ((rows // self._batch,), self._batch) if rows % self._batch == 0 else ((), rows)

    def of_expert(self, module: nn.Module, e: int) -> list[Use]:
        """Uses of one expert: a use of no rows where no call gives it a token, and none where the experts are not called."""
        calls = [rows[e] for rows in self.tokens_of[id(module)]]
        return [self._spread(rows) for rows in calls if rows] or [((), 0) for _ in calls[:1]]

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(module, nn.MultiheadAttention):
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            if query is not key or key is not value:
                self.crossing.add(id(module))
            self.uses[id(module)] += [self._tokens(x) for x in (query, key, value)]
        elif isinstance(module, nn.RNNBase):
            x = args[0] if args else next(iter(kwargs.values()), None)
            rows = x.data if isinstance(x, PackedSequence) else x
            if isinstance(rows, Tensor):
                self.uses[id(module)].append(self._spread(rows.numel() // max(rows.shape[-1], 1)))
            else:
                self.odd[id(module)] = f"it is called with a {type(x).__name__}."
        elif are_experts(module):
            try:
                self.tokens_of[id(module)].append(tokens_of_each(module, args, kwargs))
            except (KeyError, ValueError, RuntimeError, AttributeError) as error:
                self.odd[id(module)] = f"it is not called with tokens, their experts and the shares of these: {error}"
        elif (spec := self._spec(module)) is not None:
            self.elsewhere.running.append(module)
            inputs = [*args, *kwargs.values()]
            if spec.lookup and len(inputs) == 1 and isinstance(inputs[0], Tensor):
                self.uses[id(module)].append(self._tokens(inputs[0].unsqueeze(-1)))
                return
            if len(inputs) != 1:
                self.odd[id(module)] = "it is called with more than its input (an output size)."
            if not isinstance(inputs[0], Tensor):
                self.odd[id(module)] = f"it is called with a {type(inputs[0]).__name__}, not with a tensor."
            elif spec.is_conv:
                axes = len(spec.kernel_size)  # without a batch axis, too
                size, own = tuple(inputs[0].shape[-axes:]), self._own.get(id(module))
                size = size if own is None or own.pad is None else own.pad.size_of(size)
                self.uses[id(module)].append((size, inputs[0].shape[: -axes - 1].numel()))
            else:
                self.uses[id(module)].append(self._tokens(inputs[0]))
        elif isinstance(module, _BatchNorm) and module.track_running_stats and args:
            _, source = self._outputs.get(id(args[0]), (None, None))
            if source is not None:
                self.norm_behind[id(source)] = module

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._spec(module) is not None:
            self._outputs[id(output)] = output, module
            if self.elsewhere.running and self.elsewhere.running[-1] is module:
                self.elsewhere.running.pop()


def _own(module: nn.Module) -> AsPlain | str | None:
    """What a layer computes that is no plain Conv or Linear; None for one that is, and for other modules."""
    return None if LayerSpec.of(module) is not None else as_plain(module)


@contextmanager
def recording(model: nn.Module, batch: int) -> Iterator[Recorder]:
    """Records one forward pass, which leaves no trace."""
    with undisturbed(model):
        elsewhere = Elsewhere(model)
        recorder = Recorder(model, batch, elsewhere)
        try:
            with elsewhere:
                yield recorder
        finally:
            recorder.close()
