"""Runs one process of a cluster for the tests: ``python -m tests.shells.part instance '{"id": …}'``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distserve.core.types import Role
from distserve.sched.config import ClusterConfig, GatewayConfig, InstanceConfig

_MACHINES: dict[str, Any] = {"instance": InstanceConfig, "controller": ClusterConfig, "gateway": GatewayConfig}


def main(kind: str, settings: dict[str, Any]) -> int:
    """Build the options and run the process; returns its exit code."""
    settings["machine"] = _MACHINES[kind](**settings.get("machine", {}))
    if settings.get("journal"):
        settings["journal"] = Path(settings["journal"])
    if kind == "instance":
        from distserve.instance.options import InstanceOptions
        from distserve.instance.process import main as run_instance

        return run_instance(InstanceOptions(**settings | {"role": Role(settings["role"])}))
    if kind == "controller":
        from distserve.controller.options import ControllerOptions
        from distserve.controller.process import main as run_controller

        return run_controller(ControllerOptions(**settings))
    from distserve.gateway.options import GatewayOptions
    from distserve.gateway.process import main as run_gateway

    return run_gateway(GatewayOptions(**settings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
