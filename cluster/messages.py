"""What workers say to the driver of their run while it waits for them: small messages through Ray's control store.

Ray Train's own reports stop every rank and reach the controller process only. These cost a worker one round trip, need
no process of their own, and work from any node.
"""

import json
import logging
import time
from typing import Any, TypeAlias

from ray.experimental import internal_kv

Message: TypeAlias = dict[str, Any]

log = logging.getLogger(__name__)

_NAMESPACE = "onethreshold"


def post(run_id: str, message: Message) -> None:
    """Leaves a message for the driver of a run; without an id there is none that asks, and warnings are logged."""
    if not run_id:
        if "warning" in message:
            log.warning(message["warning"])
        return
    internal_kv._internal_kv_put(f"{run_id}/{time.time_ns()}", json.dumps(message), namespace=_NAMESPACE)


def take(run_id: str) -> list[Message]:
    """The messages of a run since the last time, in order."""
    found = []
    for key in sorted(internal_kv._internal_kv_list(f"{run_id}/", namespace=_NAMESPACE)):
        found.append(json.loads(internal_kv._internal_kv_get(key, namespace=_NAMESPACE)))
        internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
    return found
