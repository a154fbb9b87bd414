"""Where each layer of a checkpoint will go, before anything is loaded: `make plan`.

make_plan.py reckons, plan.py holds what came out, remedies.py says what to change when it does not fit, parallel.py how
many nodes would hold all of it on GPUs, report.py shows it to people, and __main__.py is the command.
"""

from .make_plan import make_plan
from .parallel import Parallel, parallel
from .plan import Bandwidth, Device, Plan

__all__ = ["Bandwidth", "Device", "Parallel", "Plan", "make_plan", "parallel"]
