"""Where each layer of a checkpoint will go, before anything is loaded: `make plan`.

placement.py reckons, plan.py holds what came out, remedies.py says what to change when it does not fit, report.py
shows it to people, and __main__.py is the command.
"""

from .make_plan import make_plan
from .plan import Bandwidth, Device, Plan

__all__ = ["Bandwidth", "Device", "Plan", "make_plan"]
