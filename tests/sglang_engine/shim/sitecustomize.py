"""Lets SGLang's wheel, installed without its dependencies, run its engine and HiCache on PyTorch for the CPU.

In effect where this folder is on PYTHONPATH and SGLANG_ON_CPU=1 (SGLang starts its scheduler as a process of its own:
the interpreter itself has to be hooked). Packages for CUDA become inert stand-ins, host pools are not pinned, and the
one copy kernel that HiCache needs with the "direct" backend is written in PyTorch. SGLang does not support this set-up.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import os
import sys
from unittest.mock import MagicMock

ABSENT = {"torchvision", "torchaudio", "sgl_kernel", "flashinfer", "torch_memory_saver", "decord", "timm"}
POOLS = "sglang.srt.mem_cache.pool_host."


def transfer_kv_direct(src_layers, dst_layers, src_indices, dst_indices, page_size):
    source, target = src_indices.cpu().long(), dst_indices.cpu().long()
    for a, b in zip(src_layers, dst_layers):
        b[target] = a[source]


def unpinned(module):
    plain = module.HostKVCache.__init__
    signature = inspect.signature(plain)

    def init(self, *args, **options):
        bound = signature.bind(self, *args, **options)
        bound.arguments["pin_memory"] = False
        return plain(*bound.args, **bound.kwargs)

    module.HostKVCache.__init__ = init


def unregistered(module):
    module._cuda_host_register = module._cuda_host_unregister = lambda *args, **options: None


def copying(module):
    module.transfer_kv_direct = transfer_kv_direct


CHANGES = {POOLS + "base": unpinned, POOLS + "common": unregistered, POOLS + "mha": copying, POOLS + "mla": copying}


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is absent, and changes what has to be."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def executed(module):
            execute(module)
            CHANGES[name](module)

        spec.loader.exec_module = executed
        return spec

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__, module.__version__ = [], spec, spec.name, "0.0"
        return module

    def exec_module(self, module):
        pass


if os.environ.get("SGLANG_ON_CPU") == "1":
    sys.meta_path.insert(0, Finder())
