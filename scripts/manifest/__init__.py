"""The manifests of an InferenceService, with memory, disk and probes reckoned from the checkpoint: `make manifest`.

service.py holds what is asked for, variants.py what it is made of and what goes together, checks.py refuses what the
cluster would, render.py fills the documents, cluster.py talks to the cluster, and __main__.py is the command.
"""

from .checks import check, warnings
from .render import manifests
from .service import IMAGE, Service
from .variants import BASES, variants

__all__ = ["BASES", "IMAGE", "Service", "check", "manifests", "variants", "warnings"]
