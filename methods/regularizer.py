"""Penalties on changed weights: EWC, PI and RW.

Common contract. `update` is called once per iteration, after the backward pass of the data loss
(gradients averaged over ranks and unscaled) and before the penalty's gradient is added; g below is
that gradient, theta a parameter, theta_old the teacher's. There is no penalty at step 0.

Two kinds of state leave a step: `export` is what the next step starts from (importances), while
`state_dict` is all that a resume within the step needs (snapshots and counters as well).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from methods.table import Method
from utils.errors import UserError

TensorDict = dict[str, Tensor]


class Regularizer(ABC):
    """Base of EWC, PI and RW.

    Args:
        student: the bare model (not wrapped for distribution). Parameters without a gradient
            (`--freeze`, `--fix_bn`) keep their importances and add nothing.
        teacher: the model of the step before, None at step 0.
        earlier: what that step exported, of which the penalty's importances are made.
        normalize: scale each stored tensor to [0, 1] before use (`--reg_no_normalize` off).

    Raises UserError where `earlier` does not fit the teacher.
    """

    tensors: tuple[str, ...]  # names of the per-parameter running state
    exported: tuple[str, ...]  # names of the importances that the next step reads

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None,
        earlier: Mapping[str, TensorDict] | None = None, *, normalize: bool = True,
    ) -> None:  # fmt: skip
        self.parameters = dict(student.named_parameters())
        old = dict(teacher.named_parameters()) if teacher is not None else {}
        self.reference = {k: old[k].detach() for k in self.parameters if k in old}
        self.earlier = self._checked(earlier or {}) if teacher is not None else {}
        self.importance = self._importance(normalize)

    def _checked(self, earlier: Mapping[str, TensorDict]) -> dict[str, TensorDict]:
        for name in self.exported:
            stored = earlier.get(name)
            if stored is None:
                raise UserError(
                    f"the checkpoint of the step before holds no {type(self).__name__} importances "
                    f"({name}): train that step with the same --method or --regularizer"
                )
            for key, old in self.reference.items():
                if key not in stored or stored[key].shape != old.shape:
                    raise UserError(f"the stored {name!r} importances lack or do not fit {key}")
        device = next(iter(self.parameters.values())).device
        return {name: {k: v.to(device) for k, v in earlier[name].items()} for name in self.exported}

    def _importance(self, normalize: bool) -> TensorDict:
        """Sum over the stored tensors, each normalised, for the parameters the teacher has."""
        scale = _to_unit_range if normalize else lambda t: t
        stored = list(self.earlier.values())
        return {k: sum(scale(s[k]) for s in stored) for k in self.reference} if stored else {}  # type: ignore[misc]

    @abstractmethod
    def update(self) -> None:
        """Take in one iteration's gradients (`parameter.grad`)."""

    @abstractmethod
    def export(self) -> dict[str, TensorDict]:
        """The importances the next step reads, as of now."""

    @torch.no_grad()
    def add_penalty_gradient(self, weight: float) -> Tensor | None:
        """Add the penalty's gradient to those of the data; returns weight * penalty.

        The penalty is the sum of importance * (theta - theta_old)^2 over all elements, its gradient
        2 * weight * importance * (theta - theta_old); at step 0 there is none. Not through
        `backward`, whose hooks would average over the ranks once more.
        """
        if not self.importance:
            return None
        now: list[Tensor] = [self.parameters[k] for k in self.importance]
        moved = torch._foreach_sub(now, [self.reference[k] for k in self.importance])
        weighted = torch._foreach_mul(moved, list(self.importance.values()))
        # Importances are no less than 0, and so are the products: a norm is a sum that has a kernel
        # for lists.
        products = torch._foreach_mul(list(weighted), list(moved))
        value = weight * torch.stack(torch._foreach_norm(products, 1)).sum()
        torch._foreach_mul_(weighted, 2 * weight)
        gradients, added = [], []
        for k, gradient in zip(self.importance, weighted, strict=True):
            parameter = self.parameters[k]
            if parameter.grad is not None:
                gradients.append(parameter.grad)
                added.append(gradient)
            elif parameter.requires_grad:
                parameter.grad = gradient
        if gradients:
            torch._foreach_add_(gradients, added)
        return value

    def state(self) -> dict[tuple[str, ...], list[Tensor]]:
        """The tensors that `update` changes, and of which parameters they are."""
        changing = {name: getattr(self, name) for name in self.tensors if name != "start"}
        return {(name, *tensors): list(tensors.values()) for name, tensors in changing.items()}

    def state_dict(self) -> dict[str, Any]:
        """Running state for a resume within the step."""
        return {name: dict(getattr(self, name)) for name in self.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the running state of the same step; UserError where it does not fit."""
        for name in self.tensors:
            own, stored = getattr(self, name), state.get(name)
            # Snapshots begin with the first update; the others have every parameter.
            if not isinstance(stored, Mapping) or not (
                (name == "snapshot" or set(own) == set(stored))
                and all(
                    k in self.parameters and v.shape == self.parameters[k].shape
                    for k, v in stored.items()
                )
            ):
                raise UserError(f"the checkpoint's regularizer state does not fit: {name!r}")
            own.clear()
            own.update({k: v.to(self.parameters[k].device) for k, v in stored.items()})

    def _watched(self) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Names, theta and g of the parameters that have a gradient."""
        seen = [(k, p.detach(), p.grad) for k, p in self.parameters.items() if p.grad is not None]
        return [k for k, _, _ in seen], [p for _, p, _ in seen], [g for _, _, g in seen]

    def _moved(self, snapshot: TensorDict) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Names, theta_prev - theta and g of the watched parameters that the snapshot has.

        theta_prev lies in the snapshot, which is brought up to date.
        """
        names, now, gradients = self._watched()
        if not names:
            return [], [], []
        known = [i for i, k in enumerate(names) if k in snapshot]
        before = [snapshot[names[i]] for i in known]
        moved = torch._foreach_sub(before, [now[i] for i in known]) if known else []
        snapshot |= {k: torch.empty_like(p) for k, p in zip(names, now, strict=True)
                     if k not in snapshot}  # fmt: skip
        torch._foreach_copy_([snapshot[k] for k in names], now)
        return [names[i] for i in known], list(moved), [gradients[i] for i in known]


class _FisherRegularizer(Regularizer):
    """Keeps F, a running mean of squared gradients: F <- alpha g^2 + (1 - alpha) F.

    F starts at the stored one, or at 1.
    """

    def __init__(self, *args: Any, alpha: float = 0.9, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.alpha = alpha
        stored = self.earlier.get("fisher", {})
        self.fisher = {
            k: stored[k].clone() if k in stored else torch.ones_like(p, requires_grad=False)
            for k, p in self.parameters.items()
        }

    def update(self) -> None:
        names, _, gradients = self._watched()
        if names:
            fisher = [self.fisher[k] for k in names]
            torch._foreach_mul_(fisher, 1 - self.alpha)
            torch._foreach_addcmul_(fisher, gradients, gradients, value=self.alpha)


class EWC(_FisherRegularizer):
    """Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017), Fisher kept online."""

    tensors = exported = ("fisher",)

    def export(self) -> dict[str, TensorDict]:
        return {"fisher": self.fisher}


class PI(Regularizer):
    """Path Integral, also Synaptic Intelligence (Zenke et al., ICML 2017).

    Delta starts at 0 in every step and sums g * (theta_prev - theta); the exported score is
    max(0, Delta / ((theta - theta_ref)^2 + 1e-20)) + the earlier score, theta_ref being the
    teacher's value, or that at the start of the step for parameters the teacher lacks.
    """

    tensors = ("delta", "snapshot", "start")
    exported = ("score",)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.delta = {k: torch.zeros_like(p) for k, p in self.parameters.items()}
        self.snapshot: TensorDict = {}
        self.start = {
            k: p.detach().clone() for k, p in self.parameters.items() if k not in self.reference
        }

    def update(self) -> None:
        names, moved, gradients = self._moved(self.snapshot)
        if names:
            torch._foreach_mul_(moved, gradients)
            torch._foreach_add_([self.delta[k] for k in names], moved)

    def export(self) -> dict[str, TensorDict]:
        score, earlier = {}, self.earlier.get("score", {})
        for k, p in self.parameters.items():
            reference = self.reference[k] if k in self.reference else self.start[k]
            score[k] = (self.delta[k] / ((p.detach() - reference) ** 2 + 1e-20)).clamp_min(0)
            if k in earlier:
                score[k] += earlier[k]
        return {"score": score}


class RW(_FisherRegularizer):
    """Riemannian Walk (Chaudhry et al., ECCV 2018).

    Every `interval`-th call, the first included and before F changes, the score grows by
    g (theta_prev - theta) / (F (theta - theta_prev)^2 / 2 + 1e-8). Exported: F, and the score cut
    at 0 and averaged half and half with the earlier one.
    """

    tensors = ("fisher", "running_score", "snapshot")
    exported = ("fisher", "score")

    def __init__(self, *args: Any, interval: int = 10, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.interval = interval
        self.calls = 0
        self.running_score = {k: torch.zeros_like(p) for k, p in self.parameters.items()}
        self.snapshot: TensorDict = {}

    def update(self) -> None:
        if self.calls % self.interval == 0:
            names, moved, gradients = self._moved(self.snapshot)
            if names:
                distance = torch._foreach_mul(moved, moved)
                torch._foreach_mul_(distance, [self.fisher[k] for k in names])
                torch._foreach_mul_(distance, 0.5)
                torch._foreach_add_(distance, 1e-8)
                torch._foreach_mul_(moved, gradients)
                torch._foreach_div_(moved, distance)
                torch._foreach_add_([self.running_score[k] for k in names], moved)
        self.calls += 1
        super().update()

    def export(self) -> dict[str, TensorDict]:
        earlier = self.earlier.get("score", {})
        score = {k: s.clamp_min(0) for k, s in self.running_score.items()}
        for k in score.keys() & earlier.keys():
            score[k] = 0.5 * (score[k] + earlier[k])
        return {"fisher": self.fisher, "score": score}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.calls = int(state["calls"])


KINDS = {"ewc": EWC, "rw": RW, "pi": PI}


class Regularizers:
    """The regularisers of a step by kind, used like one of them.

    At step 0, where none has a penalty, several may collect importances side by side, so that one
    checkpoint serves as the start of any of them. Later steps have one.

    Args:
        weight: of the penalty.
    """

    def __init__(self, parts: Mapping[str, Regularizer], weight: float) -> None:
        self.parts = parts
        self.weight = weight

    def update(self, overflow: Tensor | None = None) -> None:
        """Take in one iteration's gradients, unless `overflow` (a scalar on the device) is not 0.

        What a loss scaler found is not read by the host: the state is put back on the device. Only
        the intervals of RW count an iteration that overflowed.
        """
        for part in self.parts.values():
            before = {} if overflow is None else {k: _flat(v) for k, v in part.state().items()}
            part.update()
            if overflow is not None:
                _keep_where(overflow > 0, before, part.state())

    def add_penalty_gradient(self) -> dict[str, Tensor]:
        """Add the weighted penalty's gradient; returns its term, {} where there is no penalty."""
        values = [part.add_penalty_gradient(self.weight) for part in self.parts.values()]
        return {} if values[0] is None else {"reg": values[0]}

    def export(self) -> dict[str, dict[str, TensorDict]]:
        """Kind -> what `Regularizer.export` gives."""
        return {kind: part.export() for kind, part in self.parts.items()}

    def state_dict(self) -> dict[str, Any]:
        return {kind: part.state_dict() for kind, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for kind, part in self.parts.items():
            if kind not in state:
                raise UserError(f"the checkpoint holds no state of the regularizer {kind}")
            part.load_state_dict(state[kind])


def make_regularizers(
    method: Method,
    student: nn.Module,
    teacher: nn.Module | None,
    earlier: Mapping[str, Mapping[str, TensorDict]] | None,
) -> Regularizers | None:
    """The regularisers of a method; None where it has none.

    `student` is the bare model, `earlier` what the step before exported, by kind.
    """
    if method.regularizer is None:
        return None
    settings: dict[str, dict[str, Any]] = {
        "ewc": {"alpha": method.reg_alpha},
        "rw": {"alpha": method.reg_alpha, "interval": method.reg_iterations},
        "pi": {},
    }
    parts: dict[str, Regularizer] = {}
    for kind in method.regularizer.split(","):
        stored = (earlier or {}).get(kind)
        parts[kind] = KINDS[kind](
            student, teacher, stored, normalize=not method.reg_no_normalize, **settings[kind]
        )
    return Regularizers(parts, method.reg_importance)


def _to_unit_range(t: Tensor) -> Tensor:
    low, high = t.min(), t.max()
    return (t - low) / (high - low + 1e-8)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All values one after the other, in the order in which they lie in memory; a copy."""
    return torch.cat([t.as_strided((t.numel(),), (1,)) for t in tensors or [torch.empty(0)]])


def _keep_where(
    kept: Tensor,
    before: Mapping[tuple[str, ...], Tensor],
    now: Mapping[tuple[str, ...], list[Tensor]],
) -> None:
    """Give the tensors `now` their values of `before` where the scalar `kept` is true.

    Tensors that were not there before stay: the first snapshot is right in any case.
    """
    for key, old in before.items():
        if key in now and len(key) > 1:
            chosen = torch.where(kept, old, _flat(now[key]))
            parts = chosen.split([t.numel() for t in now[key]])
            torch._foreach_copy_(
                now[key],
                [x.as_strided(t.shape, t.stride()) for x, t in zip(parts, now[key], strict=True)],
            )
