"""Settings of every test process."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one of two processes on two cores: a second thread would only be in the other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
