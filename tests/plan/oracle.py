"""The optimal plan of a small graph by mixed-integer programming, for tests.

Checkmate's program (Jain et al. 2020, arXiv:1910.02653) restricted to what a training step may do:
the forward runs once, in order, and only forward values run again, in stages of the backward.

    stage t      what is done for backward node t: run some forward nodes again, in order, then t
    S[t,i]       value i is in memory when stage t begins
    R[t,i]       forward node i runs in stage t
    F[t,i,k]     value i is freed once node k has run in stage t
    U[t,k]       bytes in memory while node k runs in stage t

    minimise     sum R[t,i] seconds(i)
    such that    what runs has its inputs:    R[t,k] <= R[t,i] + S[t,i]    for inputs i of k
                 what is kept was there:      S[t+1,i] <= S[t,i] + R[t,i]
                 F[t,i,k] = 1 only if         R[t,k] = 1, S[t+1,i] = 0, no later reader of i runs
                 U[t,k] <= budget, also in the forward, where S of the first stage is kept
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


@dataclass(frozen=True)
class Step:
    """A training step as numbers.

    Attributes:
        inputs: of every node, the nodes it reads; forward nodes come first. Inputs of the model
            are left out: they are always at hand.
        bytes: of every node's value.
        seconds: of every node.
        forward: how many nodes are forward nodes.
        outputs: forward nodes whose values stay in memory to the end.
        constants: bytes that are in memory all the time.
        tangents: bytes that are in memory all through the backward.
    """

    inputs: list[tuple[int, ...]]
    bytes: list[int]
    seconds: list[float]
    forward: int
    outputs: frozenset[int]
    constants: int
    tangents: int


def least_seconds(step: Step, budget: float) -> float | None:
    """Least extra seconds of recomputation under a budget; None if no plan keeps it."""
    return _Program(step, budget).solve()


class _Program:
    def __init__(self, step: Step, budget: float) -> None:
        self.step = step
        self.budget = budget
        self.count = len(step.inputs)
        self.index: dict[tuple[object, ...], int] = {}
        self.rows: list[tuple[dict[int, float], float]] = []  # sum coefficient * variable <= bound
        self.stages = range(step.forward, self.count)
        self.users: dict[int, list[int]] = defaultdict(list)
        for node, inputs in enumerate(step.inputs):
            for i in inputs:
                self.users[i].append(node)

    def solve(self) -> float | None:
        self._forward()
        for t in self.stages:
            self._stage(t)
        size = len(self.index)
        matrix = np.zeros((len(self.rows), size))
        bounds = np.array([bound for _, bound in self.rows])
        for row, (coefficients, _) in enumerate(self.rows):
            for column, value in coefficients.items():
                matrix[row, column] = value
        cost = np.zeros(size)
        for key, column in self.index.items():
            if key[0] == "R":
                assert isinstance(key[2], int)
                cost[column] = self.step.seconds[key[2]]
        scale = cost.max() or 1.0
        found = milp(
            cost / scale,
            constraints=LinearConstraint(matrix, -np.inf, bounds),
            integrality=np.ones(size),
            bounds=Bounds(0, 1),
        )
        assert found.status in (0, 2), found.message
        return float(found.fun) * scale if found.status == 0 else None

    def _forward(self) -> None:
        """While forward node t runs, what it and later ones read is there, and what is kept."""
        step = self.step
        first = self.stages[0] if self.stages else self.count
        for t in range(step.forward):
            fixed, row = float(step.constants), defaultdict[int, float](float)
            for i in range(t + 1):
                read = any(t <= u < step.forward for u in self.users[i])
                if i == t or read or i in step.outputs:
                    fixed += step.bytes[i]
                else:
                    row[self._v("S", first, i)] += step.bytes[i]
            self.rows.append((dict(row), self.budget - fixed))

    def _stage(self, t: int) -> None:
        step = self.step
        for k in (*range(step.forward), t):
            for i in step.inputs[k]:
                if i < step.forward:
                    row = {self._v("R", t, i): -1.0, self._v("S", t, i): -1.0}
                    if k != t:
                        row[self._v("R", t, k)] = 1.0
                    self.rows.append((row, -1.0 if k == t else 0.0))
        if t + 1 < self.count:
            for i in range(step.forward):
                kept = self._v("S", t + 1, i)
                row = {kept: 1.0, self._v("S", t, i): -1.0, self._v("R", t, i): -1.0}
                self.rows.append((row, 0.0))
        self._memory(t)

    def _memory(self, t: int) -> None:
        """Bytes while each node of a stage runs; outputs and backward values count as fixed."""
        step = self.step
        fixed = step.constants + step.tangents + sum(step.bytes[o] for o in step.outputs)
        held: dict[int, float] = defaultdict(float)
        for i in range(step.forward):
            if i not in step.outputs:
                held[self._v("S", t, i)] += step.bytes[i]
        # A backward value lives until its last reader; gradients, which nobody reads, to the end.
        for i in range(step.forward, t):
            last = max(self.users[i], default=self.count)
            fixed += step.bytes[i] if last >= t else 0
        for k in (*range(step.forward), t):
            if k == t:
                fixed += step.bytes[t]
            elif k not in step.outputs:
                held[self._v("R", t, k)] += step.bytes[k]
            self.rows.append((dict(held), self.budget - fixed))
            if k != t:
                for i in {k, *step.inputs[k]} - step.outputs:
                    if i < step.forward:
                        held[self._freed(t, i, k)] -= step.bytes[i]

    def _freed(self, t: int, i: int, k: int) -> int:
        """Declares that value i is freed after node k in stage t, and when it may be."""
        step = self.step
        freed = self._v("F", t, i, k)
        self.rows.append(({freed: 1.0, self._v("R", t, k): -1.0}, 0.0))
        if t + 1 < self.count:
            self.rows.append(({freed: 1.0, self._v("S", t + 1, i): 1.0}, 1.0))
        for user in self.users[i]:
            if user == t:
                self.rows.append(({freed: 1.0}, 0.0))
            elif k < user < step.forward:
                self.rows.append(({freed: 1.0, self._v("R", t, user): 1.0}, 1.0))
        return freed

    def _v(self, *key: object) -> int:
        return self.index.setdefault(key, len(self.index))
