"""The result of wrong, damaged and hostile input: counts of tries and of failures.

    python -m benchmarks.attacks [--examples 300] [--slow]

Runs the tests in tests/attacks. For every area, prints the number of tries, of loud failures (a traceback, or an error
of more than one line), and of silent failures (a wrong result with exit code 0). Exits with code 1 if any try failed.
Needs `pip install -e ".[dev]"`.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import collections
import pathlib
import sys
import types

import pytest

from ddim_jax import cli
from experiments import common

TESTS = pathlib.Path(__file__).parents[1] / "tests"
OPTIONS = {
    "examples": ("", "The number of examples of each property. Default: as in the tests."),
    "slow": (False, "Also run the slow tests: kills at random times, full disks."),
}


class Counter:
    """A pytest plugin that counts the tries, the loud failures and the silent failures of every area."""

    def __init__(self, examples: int | None):
        self.tries, self.loud, self.silent = (collections.Counter() for _ in range(3))
        self._examples = examples

    def pytest_collection_modifyitems(self, items):
        if self._examples:
            import hypothesis

            hypothesis.settings.register_profile("counted", deadline=None, max_examples=self._examples)
            hypothesis.settings.load_profile("counted")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        import attacking

        report = yield
        area = item.path.stem.removeprefix("test_attack_")
        if call.when == "call" and not report.skipped:
            self.tries[area] += max(attacking.TRIES.pop("tries", 0), 1)
        if report.failed:
            silent = call.excinfo.errisinstance(attacking.Silent)
            (self.silent if silent else self.loud)[area] += 1
        return report


def main(options: types.SimpleNamespace) -> None:
    examples = common.ints("examples", options.examples)[0] if options.examples else None
    counter = Counter(examples)
    slow = ["-m", "slow or not slow"] if options.slow else []
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", str(TESTS / "attacks"), *slow], plugins=[counter])
    areas = sorted(counter.tries | counter.loud | counter.silent)
    rows = [[area, counter.tries[area], counter.loud[area], counter.silent[area]] for area in areas]
    total = [sum(row[i] for row in rows) for i in (1, 2, 3)]
    print(common.markdown(["area", "tries", "failed loudly", "failed in silence"], [*rows, ["all", *total]]))
    sys.exit(1 if total[1] + total[2] else 0)


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
