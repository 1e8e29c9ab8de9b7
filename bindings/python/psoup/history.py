"""What a training reports, and a training that is iterated over."""

from __future__ import annotations

import html
import math
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from ._library import Handle

__all__ = ["Step", "History", "Run"]


class Step(NamedTuple):
    """One report: the metrics of one step, or of one validation. Metrics are attributes too: `step.reward`."""

    phase: str
    """"train" or "validation"."""
    subject: str
    """The adapter trained; "base" for a base."""
    step: int
    total: int
    metrics: Dict[str, float]
    """"loss", "reward", "kl", ..."""
    times: Dict[str, float] = {}
    """What the clock says of a training step: "seconds", "tokens_per_second", and PPO's phases; not in the
    metrics file."""

    def __getattr__(self, name: str) -> float:
        try:
            return self.metrics[name]
        except KeyError:
            raise AttributeError("this report has no metric %r, but %s" % (name, ", ".join(self.metrics))) from None

    def __str__(self) -> str:
        return "%s: step %d/%d%s: %s" % (
            self.subject, self.step, self.total, "" if self.phase == "train" else ", " + self.phase,
            "  ".join("%s %.4g" % pair for pair in self.metrics.items()))


OnStep = Callable[[Step], Any]

# Of similar lightness, and told apart by those who see no red or no green; as psoup plot has them.
COLOURS = ("#2563eb", "#dd6b20", "#0f8a5f", "#b5179e", "#0891b2", "#c0362c", "#7c3aed", "#8a6d1a")
COLUMNS = ("reward", "accuracy", "loss", "kl", "kl_coefficient", "value_loss", "length", "margin", "grad_norm")
KEPT = 10000


class History(List[Step]):
    """The reports of a training, the last 10 000 or more of them. A notebook shows it as a table and a curve."""

    def append(self, step: Step) -> None:
        if len(self) >= 2 * KEPT:
            del self[:KEPT]
        super().append(step)

    @property
    def subjects(self) -> Tuple[str, ...]:
        """Who trains, in the order of their first reports."""
        return tuple(dict.fromkeys(s.subject for s in self))

    def values(self, metric: str, subject: Optional[str] = None, phase: str = "train") -> List[Tuple[int, float]]:
        """(step, value) of one metric; of one subject, where there are several."""
        return [(s.step, s.metrics[metric]) for s in self
                if s.phase == phase and metric in s.metrics and subject in (None, s.subject)]

    def best(self, subject: str) -> Optional[Step]:
        """The validation whose weights a training keeps: of the highest reward, or accuracy and then lowest
        loss, or lowest loss."""
        def worth(s: Step) -> Tuple[float, float]:
            m = s.metrics
            main = m.get("reward", m.get("accuracy", -m.get("loss", math.inf)))
            return (main, -m["loss"] if "accuracy" in m and "loss" in m else 0.0)
        found = [s for s in self if s.phase == "validation" and s.subject == subject
                 and not any(math.isnan(x) for x in worth(s))]
        return max(found, key=worth, default=None)

    def _main(self) -> str:
        there = {name for s in self for name in s.metrics}
        return next((name for name in COLUMNS if name in there), "")

    def _curve(self, metric: str, width: int = 420, height: int = 110) -> str:
        lines = [[p for p in self.values(metric, name) if math.isfinite(p[1])] for name in self.subjects]
        points = [p for line in lines for p in line]
        if len(points) < 2:
            return ""
        x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
        y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
        out = ['<svg viewBox="0 0 %d %d" width="%d" height="%d" role="img">' % (width + 70, height + 20, width + 70,
                                                                             height + 20)]
        for i, line in enumerate(lines):
            line = line[::max(len(line) // 400, 1)]
            out.append('<polyline fill="none" stroke="%s" stroke-width="1.6" points="%s"/>' % (
                COLOURS[i % len(COLOURS)],
                " ".join("%.1f,%.1f" % (4 + width * (x - x0) / max(x1 - x0, 1),
                                        6 + height * (1 - (y - y0) / ((y1 - y0) or 1))) for x, y in line)))
        for y, value in ((14, y1), (height + 6, y0)):
            out.append('<text x="%d" y="%d" font-size="11" fill="currentColor">%.3g</text>' % (width + 10, y, value))
        return "".join(out) + "</svg>"

    def _repr_html_(self) -> str:
        last = {s.subject: s for s in self if s.phase == "train"}
        columns = [c for c in COLUMNS if any(c in s.metrics for s in last.values())]
        main = self._main()
        out = ["<div>%s</div>" % html.escape(main), self._curve(main),
               "<table><tr><th></th><th>step</th>%s<th>best validation</th></tr>" % "".join(
                   "<th>%s</th>" % html.escape(c) for c in columns)]
        for i, (name, s) in enumerate(last.items()):
            best = self.best(name)
            out.append('<tr><td><span style="color:%s">&#9679;</span> %s</td><td>%d/%d</td>%s<td>%s</td></tr>' % (
                COLOURS[i % len(COLOURS)], html.escape(name), s.step, s.total,
                "".join("<td>%.4g</td>" % s.metrics.get(c, math.nan) for c in columns),
                "" if best is None else "%s %.4g at %d" % (html.escape(main), best.metrics.get(main, math.nan),
                                                           best.step)))
        return "".join(out) + "</table>"


class Run(Handle):
    """A training that goes step by step, and gives its reports to who iterates over it:

        for step in psoup.SFT(model, examples, "A"):
            print(step.loss)

    Each step's reports come one after another, validations too; between them the model may be used. The loop's
    end leaves the best weights, as run() does; who breaks off keeps the weights as they are, and may go on with
    another loop, or with run()."""

    history: History
    """What was reported so far."""
    _seen: List[Step]

    def _told(self, on_step: Optional[OnStep]) -> OnStep:
        """What keeps each report, and passes it on."""
        history, seen = self.history, self._seen = History(), []  # a callback that held self would keep it alive

        def told(step: Step) -> None:
            history.append(step)
            seen.append(step)
            if on_step is not None:
                on_step(step)
        return told

    def step(self) -> int:
        """One step of everyone who has steps to go, and the validation that is due. Returns how many steps are
        left."""
        raise NotImplementedError

    def run(self) -> None:
        """Steps to the end, and leaves the best weights."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Step]:
        left = 1
        while left:
            self._seen.clear()
            left = self.step()
            reports = list(self._seen)
            yield from reports
        self.run()

    def _repr_html_(self) -> str:
        return self.history._repr_html_()
