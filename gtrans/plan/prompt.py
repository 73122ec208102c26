"""Compute again at once what lets go of more than it takes.

    a = wide(x)              a = wide(x)
    dw = mm(dz, a)           dw = mm(dz, a)
    ...                      t = narrow(a)           # a is let go of here
    t = narrow(a)            s = sub(y, t)           # and y
    s = sub(y, t)      -->   ...
    ds = b(dy, s)            ds = b(dy, s)

What is computed again stands right before its first reader, which for most values is best. But
where a value is the last reader of others that are larger in sum, these wait for it: the inside of
a branch for the stream that it is subtracted from, a block later. Such a value moves up to where
its inputs have no other reader left, together with values on the way that change nothing by
themselves (t, if it is as large as a).

Nothing is computed more or less often, and no value changes.
"""

from collections.abc import Iterable

from gtrans.analysis.liveness import Storages
from gtrans.analysis.schedule import Schedule


def prompt(schedule: Schedule) -> Schedule:
    """The schedule with such values moved up; the same object if there are none."""
    return _Mover(schedule).run()


class _Mover:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.tasks = schedule.tasks
        self.storages = Storages(schedule)
        self.end = len(self.tasks)
        tangents = (t.node.op == "placeholder" for t in self.tasks[schedule.boundary :])
        self.first = schedule.boundary - 1 + sum(tangents)
        self.place = list(range(self.end))
        self.on_trial: dict[int, int] = {}
        self.uses: dict[int, list[int]] = {}
        for number in range(schedule.boundary, self.end):
            for read in self.tasks[number].reads:
                for storage in self.storages.held[read]:
                    self.uses.setdefault(storage, []).append(number)

    def run(self) -> Schedule:
        for number in range(self.schedule.boundary, self.end):
            if self.tasks[number].again and self._allocates(number):
                self._consider(number)
        order = sorted(range(self.end), key=lambda n: (self.place[n], n))
        return self.schedule if order == list(range(self.end)) else self._reordered(order)

    def _consider(self, number: int) -> None:
        """Moves a task if that pays; if it costs nothing, waits whether a later one pays for it."""
        at = max((self.first, *(self._ready(r) for r in self.tasks[number].reads)))
        cost = sum(self._bytes(s) for s in self.storages.held[number])
        gain = 0
        for free, size in sorted(self._let_go(number)):
            if free > at and gain >= cost:
                break
            at, gain = max(at, free), gain + size
        if gain < cost or at >= number:
            return
        self.on_trial[number] = at
        if gain > cost:
            self._move(number)

    def _let_go(self, number: int) -> Iterable[tuple[int, int]]:
        """Where each storage that only this task still needs has no other reader, and its bytes."""
        storages = {s for r in self.tasks[number].reads for s in self.storages.held[r]}
        for storage in storages:
            owner = self.storages.owners[storage][0]
            if self.storages.last[storage] == number and owner not in self.schedule.constants:
                others = [u for u in self.uses[storage] if u != number and self._matters(u)]
                free = max((self._at(owner), *(self.place[u] for u in others)))
                yield free, self._bytes(storage)

    def _matters(self, number: int) -> bool:
        """Whether a reader is more than a view that follows whatever it is moved for."""
        return self._allocates(number) or not self.tasks[number].again

    def _ready(self, number: int) -> int:
        """Where a value is there, if views of it are made when they are wanted."""
        while number >= self.schedule.boundary and not self._matters(number):
            (number, *_) = self.tasks[number].reads or (0,)
        return self._at(number)

    def _at(self, number: int) -> int:
        return self.on_trial.get(number, self.place[number])

    def _move(self, number: int) -> None:
        """Moves a task, what moves with it, and the views it reads."""
        at = self.place[number] = self.on_trial.pop(number)
        pending = list(self.tasks[number].reads)
        while pending:
            read = pending.pop()
            if read in self.on_trial:
                self._move(read)
            elif read >= self.schedule.boundary and not self._matters(read):
                self.place[read] = min(self.place[read], at)
                pending += self.tasks[read].reads

    def _allocates(self, number: int) -> bool:
        held = self.storages.held[number]
        return bool(held) and self.storages.owners[held[0]][0] == number

    def _bytes(self, storage: int) -> int:
        return self.storages.owners[storage][1]

    def _reordered(self, order: list[int]) -> Schedule:
        moved = {old: new for new, old in enumerate(order)}
        tasks = [
            self.tasks[n]._replace(reads=tuple(moved[r] for r in self.tasks[n].reads))
            for n in order
        ]
        old = self.schedule
        kept = frozenset(moved[n] for n in old.kept)
        return Schedule(tasks, old.boundary, old.constants, kept, old.cut, old.forward)
