"""Runs one file of unittest tests and writes what came of each as JSON: ... child FILE OUT [words for the file]."""

from __future__ import annotations

import importlib.util
import json
import sys
import unittest
from pathlib import Path


class Rows(unittest.TextTestResult):
    """A result that keeps every test."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.rows = []

    def _keep(self, test, outcome, words=""):
        name = getattr(test, "id", lambda: str(test))().removeprefix("wheel_test.")
        self.rows.append((name, outcome, words))

    def addSuccess(self, test):
        super().addSuccess(test)
        self._keep(test, "passed")

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self._keep(test, "failed", self.failures[-1][1])

    def addError(self, test, err):
        super().addError(test, err)
        self._keep(test, "failed", self.errors[-1][1])

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self._keep(test, "skipped", reason)


def main(path, out, *words):
    sys.argv = [path, *words]
    spec = importlib.util.spec_from_file_location("wheel_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["wheel_test"] = module
    spec.loader.exec_module(module)
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    result = unittest.TextTestRunner(resultclass=Rows, verbosity=0).run(suite)
    Path(out).write_text(json.dumps(result.rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
