"""The file that a started owner runs first: leaves whoever started it, finds the same tiercache, and hands over.

Run by its path as `python -E -P launch.py DIR --listen FD --settings FD`, so nothing of tiercache is imported before
the process is on its own. -E and -P keep what the user's environment and working directory would import out of the
owner: a sitecustomize, a file named like a module of the standard library.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import signal
import sys


def main() -> None:
    """See the module."""
    # Twice forked: the one who started this has no child to bury, however long both live.
    if os.fork():
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    descriptor = int(sys.argv[sys.argv.index("--settings") + 1])
    plan = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    # The very package of the starter, wherever that was found; for what it imports in turn, the starter's path counts
    # after the standard library and the installed packages.
    root = plan["root"]
    spec = importlib.util.spec_from_file_location(
        "tiercache", os.path.join(root, "__init__.py"), submodule_search_locations=[root]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["tiercache"] = package
    spec.loader.exec_module(package)
    sys.path += [path for path in plan["paths"] if path not in sys.path]
    runpy.run_module(plan["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
