"""What the numbers say, in sentences made from them, and the mechanisms that a reader compares first."""

from collections.abc import Iterator

from pipeline.host.text import counted
from pipeline.reporting import Report
from pipeline.reporting._answers import advice, answers, answers_on_trained
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._table import Table, Text
from pipeline.reporting.accuracy import table


class Findings(Report):
    """The first screen: when to use it, the answers, and a table of at most eight rows for each task."""

    title = "Findings"
    order = 0

    def make(self, comparison: Comparison) -> Iterator[Text | Table]:
        results = comparison.results
        boxes = zip(("Use it if", "Do not use it if"), advice(comparison), strict=True)
        yield from (Text(title, tuple(lines), boxed=True) for title, lines in boxes if lines)
        shown = [*answers_on_trained(results), *(answers(comparison) if results.scores else ())]
        tables = [
            table(comparison, task, comparison.roles(task), f"summary-{task}", f"What to compare first on {task}")
            for task, tested in comparison.tasks.items()
            if tested
        ]
        yield from tables[:1]
        yield Text("What the numbers show", tuple(shown or ["Nothing yet: no cell is finished."]), "findings")
        yield from tables[1:]
        if limits := list(_limits(comparison)):
            yield Text("How far that carries", tuple(limits))


def _limits(comparison: Comparison) -> Iterator[str]:
    results = comparison.results
    if results.scores and len(results.seeds) < 2:
        yield "There is one seed: no difference can be tested."
    for task, tested in comparison.tasks.items():
        rising = sum(comparison.steps_of(task, mechanism)[1] for mechanism in tested)
        if rising:
            yield f"{task}: {rising} of {counted(len(tested), 'mechanism')} had not stopped learning."
