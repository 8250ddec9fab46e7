"""The pipeline's stages, the plan that orders them, and the one place that knows DVC."""

import os

# One torch thread per process: stages are the unit of parallelism, and one thread is bit-deterministic.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
