"""What several of this package's test files use."""

import bitnet_kernels
import pytest


@pytest.fixture(params=bitnet_kernels.available_isas())
def isa(request):
    """Every instruction set in turn, in use while the test runs."""
    before = bitnet_kernels.isa()
    bitnet_kernels.use_isa(request.param)
    yield request.param
    bitnet_kernels.use_isa(before)
