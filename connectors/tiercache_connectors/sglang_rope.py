"""Whether SGLang turns the keys of a token the same way whatever else is computed beside it.

A "longrope" has two sets of factors. vLLM takes one of them for all requests (see vllm_layout.long_rope); SGLang takes
the long ones for a whole batch as soon as one of its requests is longer than the model was trained for at first. So
what lies in a page is decided by other requests, which no key can tell.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tiercache_connectors.weights import configuration

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = ("longrope", "su")
"""By its names, the old one included."""
NAMED = ("rope_type", "type")
"""Where a table says its name. Tables of other things may have anything there, lists too."""


def unsteady(model: str, revision: str, args: Any) -> str:
    """Why KV of this model cannot be reused, or nothing. `model`: the name or directory that SGLang loads, empty where
    that is not known. `args`: what else SGLang was told; None outside of an engine."""
    if not model:
        return "SGLang does not say which model it runs, and so not how it turns keys"
    facts = configuration(model, revision)
    if facts is None:
        return f"no config.json of {model} can be read here, which says how SGLang turns keys"
    try:
        overrides = json.loads(getattr(args, "json_model_override_args", None) or "{}")
    except ValueError:
        overrides = {}
    ropes = [rope for rope in _tables([facts, overrides]) if any(rope.get(key) in LONG for key in NAMED)]
    if not ropes:
        return ""
    first = [each.get("original_max_position_embeddings") for each in _tables([facts, overrides])]
    limits = [each for each in first if isinstance(each, int)]
    longest = getattr(args, "context_length", None)
    if longest and limits and longest <= min(limits):
        return ""  # no request is ever so long
    return "with its rotary embedding (longrope) SGLang makes keys that depend on other requests of a batch" + (
        f": start it with --context-length {min(limits)} or less" if limits else ""
    )


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    """All tables inside of a configuration, itself included."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tables(each)
