"""Which implementation of an operation runs: constraints as data, selection as a pure function.

An `Operation` has one specification, its *eager twin*, written in plain PyTorch, and any number of faster
implementations, each with the constraints under which it may run. It is registered as a `torch.library` operation
(`torch.ops.turbowan.<name>`) with a fake implementation, so tracing and `torch.compile` see one opaque node.
Where a gradient or a forward-mode tangent is wanted, the eager twin runs inline and PyTorch differentiates it, under
autocast as PyTorch's own layers do. Elsewhere an operation keeps to the dtypes it documents, autocast or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any
from warnings import warn

import torch
from torch.utils.flop_counter import register_flop_formula

from ..errors import MachineError, Note
from ..machine import version_numbers

NAMESPACE = "turbowan"


@dataclass(frozen=True)
class Facts:
    """What selection looks at: the device, the shapes of one call, and PyTorch's version; nothing else."""

    device: str  # "cpu", "cuda"
    dtype: torch.dtype
    head_size: int | None = None
    capability: tuple[int, int] | None = None  # CUDA compute capability
    pytorch: str = str(torch.__version__)
    rocm: bool = torch.version.hip is not None  # PyTorch for AMD's GPUs, which it calls "cuda" too

    @classmethod
    def of(cls, tensor: torch.Tensor, head_size: int | None = None) -> Facts:
        capability = torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None
        return cls(tensor.device.type, tensor.dtype, head_size, capability)


@dataclass(frozen=True)
class Constraints:
    """Where an implementation may run. `None` means anywhere."""

    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_sizes: tuple[int, ...] | None = None
    min_capability: tuple[int, int] | None = None
    max_capability: tuple[int, int] | None = None
    packages: tuple[str, ...] = ()  # that must be installed, each with the oldest version that serves: "triton>=3.4"
    # from a compute capability up to the next one named, the first PyTorch that serves; None: none that we know of
    torch_from: Mapping[tuple[int, int], str | None] | None = None

    def refusal(self, facts: Facts) -> str | None:
        """Why these facts are outside the constraints, in a few words; None when they are inside."""
        return self.mismatch(facts) or self.lack(facts)

    def lack(self, facts: Facts) -> str | None:
        """Of the reasons, those that lie in what is installed."""
        if facts.rocm and facts.device == "cuda" and self.devices is not None:
            return "is for NVIDIA's GPUs, and this PyTorch is built for AMD's (ROCm)"
        return next(filter(None, map(_lack, self.packages)), None)

    def mismatch(self, facts: Facts) -> str | None:
        """Of the reasons, those that lie in the device and the call."""
        if self.devices is not None and facts.device not in self.devices:
            return f"needs device {'/'.join(self.devices)}, got {facts.device}"
        if self.dtypes is not None and facts.dtype not in self.dtypes:
            return f"needs dtype {'/'.join(str(d).removeprefix('torch.') for d in self.dtypes)}, got {facts.dtype}"
        if self.head_sizes is not None and facts.head_size is not None and facts.head_size not in self.head_sizes:
            return f"needs head size {'/'.join(map(str, self.head_sizes))}, got {facts.head_size}"
        if self.min_capability is not None and (facts.capability or (0, 0)) < self.min_capability:
            return f"needs compute capability {self.min_capability}, got {facts.capability}"
        if self.max_capability is not None and (facts.capability or (0, 0)) > self.max_capability:
            return f"is for compute capability {self.max_capability} at most, got {facts.capability}"
        if self.torch_from is not None and facts.capability is not None:
            needed = self.torch_from[max(known for known in self.torch_from if known <= facts.capability)]
            if needed is None:
                return f"no PyTorch is known to have it for compute capability {facts.capability}"
            if version_numbers(facts.pytorch) < version_numbers(needed):
                return f"needs PyTorch {needed} for compute capability {facts.capability}, got {facts.pytorch}"
        return None


def _lack(requirement: str) -> str | None:
    """Why an installed package is not what is needed, such as "triton" or "triton>=3.4"; None where it is."""
    name, _, oldest = requirement.partition(">=")
    if not _installed(name):
        return f"needs the package {name}, which is not installed"
    found = _version(name) if oldest else None
    if found is not None and version_numbers(found) < version_numbers(oldest):
        return f"needs {name} {oldest} or later, got {found}"
    return None


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _version(package: str) -> str | None:
    """Of an installed package; None where that does not tell."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # Triton also comes as `pytorch-triton` and `triton-windows`
        with suppress(ImportError):
            return str(getattr(import_module(package), "__version__", "")) or None
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation. Among those that may run, the highest priority wins.

    fits: from a call's arguments, why this call is not for it, None where it is: for what `Constraints` do not know.
        Asked at each call, so it must be cheap. limits: what it asks for, in a few words.
    """

    name: str
    function: Callable[..., Any]
    constraints: Constraints = Constraints()
    priority: int = 0
    fits: Callable[..., str | None] | None = None
    limits: str = ""


@dataclass(frozen=True)
class Choice:
    """The outcome of a selection.

    refused: names of those that cannot run here, each with the reason. passed_over: those that could run too, highest
    priority first; the first of them takes the calls that do not fit the one chosen.
    """

    implementation: Implementation
    refused: tuple[tuple[str, str], ...]
    passed_over: tuple[Implementation, ...] = ()
    forced: bool = False

    def others(self) -> dict[str, str]:
        """Every implementation that was not chosen, with the reason in a few words."""
        chosen = self.implementation
        return {name: reason for name, reason in self.refused if name != chosen.name} | {
            other.name: f"could run, but {chosen.name} "
            + ("is forced" if self.forced else f"has priority {chosen.priority} over {other.priority}")
            + (f" for {chosen.limits}" if chosen.limits and not self.forced else "")
            for other in self.passed_over
        }


class Operation:
    """One operation of the package; call it like a function.

    Args:
        name: the operation's name in `torch.ops.turbowan`.
        eager: the specification. Its annotations give the operation's schema.
        fake: same arguments, returns empty tensors of the right shape and dtype.
        flops: multiply-adds times two from the arguments' shapes, for `torch.utils.flop_counter`.
        gradient: False where rounding leaves none; asking for one is then an error instead of zeros.
        reads: the dtype of the first argument, where it is always the same.
    """

    def __init__(
        self,
        name: str,
        eager: Callable[..., Any],
        fake: Callable[..., Any],
        flops: Callable[..., int] | None = None,
        gradient: bool = True,
        reads: torch.dtype | None = None,
    ) -> None:
        self.name = name
        self.reads = reads
        self.eager = eager
        self.gradient = gradient
        self.implementations: list[Implementation] = [Implementation("eager", eager)]
        self.forced: str | None = None
        self._chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}  # by what `Facts` are made of
        OPERATIONS[name] = self
        if hasattr(getattr(torch.ops, NAMESPACE), name):  # by another copy of the package: each keeps its own choice
            self._registered: Callable[..., Any] = self._run
        else:
            schema = torch.library.infer_schema(eager, mutates_args=())
            registered = torch.library.custom_op(f"{NAMESPACE}::{name}", self._run, mutates_args=(), schema=schema)
            registered.register_fake(fake)
            if flops is not None:
                register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(flops)
            self._registered = getattr(getattr(torch.ops, NAMESPACE), name)

    def add(self, implementation: Implementation) -> None:
        """Offer a further implementation; `select` weighs it from the next call on."""
        self.implementations.append(implementation)
        self._chosen.clear()

    def select(self, facts: Facts, forced: str | None = None) -> Choice:
        """Pure choice by constraints and priority. A forced implementation runs or raises, never falls back.

        Raises:
            MachineError: the forced implementation is unknown or cannot run here.
        """
        refused = []
        candidates = []
        for implementation in sorted(self.implementations, key=lambda i: -i.priority):
            reason = implementation.constraints.refusal(facts)
            if reason is None:
                candidates.append(implementation)
            else:
                refused.append((implementation.name, reason))
        chosen = next((i for i in candidates if forced in (None, i.name)), None)
        if chosen is None:
            why = dict(refused).get(str(forced), f"known: {', '.join(i.name for i in self.implementations)}")
            raise MachineError(f"operation {self.name} cannot use '{forced}' here ({why})")
        passed_over = tuple(i for i in candidates if i is not chosen)
        return Choice(chosen, tuple(refused), passed_over, forced is not None)

    def _choose(self, facts: Facts) -> Callable[..., Any]:
        """What runs for these facts: a function of the operation's arguments."""
        choice = self.select(facts, self.forced)
        chosen = choice.implementation
        if facts.device == "cuda" and self.forced is None and chosen.name == "eager":
            others = (i.constraints for i in self.implementations if i.constraints.mismatch(facts) is None)
            reason = next(filter(None, (constraints.lack(facts) for constraints in others)), None)
            if reason is not None and not _noted:
                _noted.append(reason)
                warn(f"{self.name} runs in plain PyTorch, slowly: our kernel {reason}", Note, stacklevel=2)
        if chosen.fits is None:
            return chosen.function
        return self._first_that_fits(chosen, *(() if choice.forced else choice.passed_over))

    def _first_that_fits(self, *implementations: Implementation) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            for implementation in implementations:
                reason = None if implementation.fits is None else implementation.fits(*args, **kwargs)
                if reason is None:
                    return implementation.function(*args, **kwargs)
            raise MachineError(f"operation {self.name} cannot use '{implementation.name}' for this call ({reason})")

        return run

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        device = args[0].device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._run(*args, **kwargs)
        forced = self.forced
        if len(self.implementations) == 1 and forced is None:
            return self.eager(*args, **kwargs)
        x = args[0]
        known = (x.device, x.dtype, x.shape[-1], forced)
        if known not in self._chosen:
            self._chosen[known] = self._choose(Facts.of(x, x.shape[-1]))
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):  # kernels go to the current device, wherever their arguments lie
                return self._chosen[known](*args, **kwargs)
        return self._chosen[known](*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not differentiated(args):  # PyTorch's way to it takes the host as long as a kernel's launch
            return (self._registered if _watched(args[0]) else self._run)(*args, **kwargs)
        if not self.gradient:
            raise MachineError(f"operation {self.name} has no gradient; train with weights that are not quantised")
        if self.forced not in (None, "eager"):
            raise MachineError(f"operation {self.name} cannot use '{self.forced}' here (only 'eager' has a gradient)")
        return self.eager(*args, **kwargs)


OPERATIONS: dict[str, Operation] = {}
_noted: list[str] = []  # why our kernels do not run on this machine's GPU: said once, of all operations together


def forward_mode() -> bool:
    """Whether tangents are being carried along (`torch.func.jvp`, `torch.autograd.forward_ad`)."""
    return torch.autograd.forward_ad._current_level >= 0


def _watched(x: torch.Tensor) -> bool:
    """Whether PyTorch is to see the operation as one: it compiles, a mode counts or fakes, x is no plain tensor."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta
    return torch.compiler.is_compiling() or not plain or torch._C._len_torch_dispatch_stack() > 0


def differentiated(args: tuple[Any, ...]) -> bool:
    """Whether PyTorch will want to differentiate what is computed from these arguments."""
    return forward_mode() or (
        torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
    )


@contextmanager
def force(**names: str) -> Iterator[None]:
    """Run with the named implementations, e.g. `force(layer_norm="eager")`; raises where one cannot run.

    In the whole process, other threads included: what belongs to a thread alone `torch.compile` cannot read.
    """
    before = {name: OPERATIONS[name].forced for name in names}
    try:
        for name, implementation in names.items():
            OPERATIONS[name].forced = implementation
        yield
    finally:
        for name, earlier in before.items():
            OPERATIONS[name].forced = earlier


def explain(facts: Facts) -> dict[str, Choice]:
    """What each operation would use for these facts, and why; printed by `turbowan doctor`."""
    return {
        name: operation.select(replace(facts, dtype=operation.reads or facts.dtype), operation.forced)
        for name, operation in sorted(OPERATIONS.items())
    }


def compile_eager(name: str) -> None:
    """Let an operation's eager twin run through `torch.compile` from now on: for training, where kernels have no
    backward. Any shape, any layout."""
    operation = OPERATIONS[name]
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    operation.eager = torch.compile(operation.implementations[0].function, dynamic=True)
