"""What the manifests are rendered for, and what follows from it."""

import math
from dataclasses import dataclass, field

from scripts.archive import startup_seconds
from scripts.plan import Plan

# The tag is the version in pyproject.toml: the manifests name modules of the image, so both must be of one version.
IMAGE = "torchserve-large-models:0.2.0"
AUTH = ("api-key", "none")  # as server/container.py knows them
LEAST_GRACE, MOST_GRACE = 120, 3600  # seconds that a pod gets to answer what it has begun


@dataclass(frozen=True)
class Service:
    """What the manifests are rendered for."""

    name: str
    storage_uri: str
    plan: Plan
    archive_format: str = "zip-store"
    image: str = IMAGE
    cpus: int = 4
    replicas: int = 1
    max_replicas: int | None = None
    namespace: str | None = None
    service_account: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, str]] = field(default_factory=list)
    gpu_resource: str = "nvidia.com/gpu"
    source_uri: str | None = None  # what the loader fills the volume from
    claim_bytes: int = 0  # of a volume claim that is there
    s3: dict[str, str] = field(default_factory=dict)  # "region", "endpoint", "role"
    node_group: str = "workers"
    prometheus: str | None = None
    auth: str = AUTH[0]

    @property
    def downloads(self) -> bool:
        """Whether the pod fetches the archive before it starts."""
        return not self.storage_uri.startswith(("pvc://", "oci://"))

    @property
    def startup(self) -> int:
        """Seconds that the container gets to unpack and load."""
        return startup_seconds(self.plan.checkpoint_bytes)

    @property
    def longest_answer(self) -> int:
        """Seconds after which a request may be given up: the wait in the queue, then twice the time that the steps of a
        default answer take at least."""
        settings = self.plan.settings
        steps = settings.max_new_tokens + math.ceil(self.plan.max_sequence_length / settings.prefill_chunk)
        return max(600, math.ceil(settings.max_wait + 2 * steps * self.plan.seconds_a_step))

    @property
    def grace(self) -> int:
        return min(max(LEAST_GRACE, self.longest_answer + 10 if self.plan.offloaded else 0), MOST_GRACE)

    @property
    def volume(self) -> tuple[str, str]:
        """Claim and path of pvc://CLAIM/PATH."""
        claim, _, path = self.storage_uri.removeprefix("pvc://").partition("/")
        return claim, path.strip("/")
