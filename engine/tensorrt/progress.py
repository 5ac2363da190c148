"""The builder's nested phases as one fraction that only grows."""

from dataclasses import dataclass, field


@dataclass
class _Phase:
    steps: int
    done: int = 0
    children: list["_Phase"] = field(default_factory=list)

    @property
    def fraction(self) -> float:
        running = sum(child.fraction for child in self.children) / max(len(self.children), 1)
        return min(1.0, (self.done + min(running, 1.0)) / max(self.steps, 1))


class Progress:
    """Follows the calls of TensorRT's `IProgressMonitor`; names of phases are unique while they run."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[_Phase, _Phase | None]] = {}
        self._root: _Phase | None = None
        self._fraction = 0.0
        self.phase = ""

    @property
    def fraction(self) -> float:
        """How much of the build is done, 0 to 1; steps differ in length, so it isn't the share of the time."""
        if self._root is not None:
            self._fraction = max(self._fraction, self._root.fraction)
        return self._fraction

    def start(self, name: str, parent: str | None, steps: int) -> None:
        above = self._running.get(parent, (None, None))[0] if parent else None
        phase = _Phase(steps)
        if above is not None:
            above.children = [phase]
        elif self._root is None:
            self._root = phase
        self._running[name] = (phase, above)
        self.phase = name

    def step(self, name: str, step: int) -> None:
        if name in self._running:
            phase, _ = self._running[name]
            phase.done, phase.children = min(step + 1, phase.steps), []

    def finish(self, name: str) -> None:
        phase, above = self._running.pop(name, (None, None))
        if phase is None:
            return
        phase.done, phase.children = phase.steps, []
        if above is not None:
            above.children = []
