import pytest
import torch
from data_handler import UserError
from data_handler.influence import Hadamard, Rademacher, make_projector, walsh_hadamard
from data_handler.influence.projection import Identity

SIZES = [1, 3, 100, 576, 1000, 4097]


def sylvester(size):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128, 1024])
def test_the_fast_transform_is_the_textbook_matrix(size):
    x = torch.randn(3, 2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(walsh_hadamard(x), x @ sylvester(size))
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), x)


def test_a_size_that_is_no_power_of_two_is_refused_by_the_transform_alone():
    with pytest.raises(UserError, match="needs a power of two, not 12"):
        walsh_hadamard(torch.zeros(12))


@pytest.mark.parametrize("make", [Rademacher, Hadamard])
@pytest.mark.parametrize("size", [100, 576, 1000, 4097])
def test_inner_products_are_kept_at_sizes_that_are_no_powers_of_two(make, size):
    """Johnson-Lindenstrauss: unbiased, and the error of unit vectors' products has a deviation of at most sqrt(2 / k)."""
    dimension, seeds = 64, 100
    generator = torch.Generator().manual_seed(size)
    vectors = torch.randn(6, size, generator=generator)
    vectors[1] += vectors[0]
    vectors[5] = 0
    vectors[5, size // 2] = 1.0  # all in one number
    vectors /= vectors.norm(dim=1, keepdim=True)
    exact = vectors @ vectors.T
    errors = []
    for seed in range(seeds):
        projected = make(size, dimension, seed)(vectors)
        errors.append(projected @ projected.T - exact)
    stacked = torch.stack(errors)
    deviation = (2 / dimension) ** 0.5
    assert stacked.pow(2).mean(0).sqrt().max() < 1.25 * deviation
    assert stacked.mean(0).abs().max() < 5 * deviation / seeds**0.5
    assert stacked.std(0).max() > 0.2 * deviation or make is Hadamard  # it is random at all


@pytest.mark.parametrize("make", [Rademacher, Hadamard])
@pytest.mark.parametrize("size", SIZES)
def test_projections_are_linear_and_depend_on_the_seed_alone(make, size):
    x, y = torch.randn(2, 4, size, generator=torch.Generator().manual_seed(0))
    project = make(size, min(size, 16), 7)
    torch.testing.assert_close(project(2 * x - y), 2 * project(x) - project(y), rtol=1e-4, atol=1e-4)
    assert torch.equal(project(x), make(size, min(size, 16), 7)(x))
    if size > 8:
        assert not torch.allclose(project(x), make(size, min(size, 16), 8)(x))


@pytest.mark.parametrize("size", [100, 576, 1024])
def test_all_rows_of_a_padded_hadamard_keep_inner_products_exactly(size):
    full = Hadamard(size, 1 << (size - 1).bit_length(), 0)
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(full(x) @ full(x).T, x @ x.T, rtol=1e-4, atol=1e-4)


def test_without_random_signs_a_hadamard_would_lose_a_flat_vector():
    """The control: rows at random see nothing of a vector that the plain transform gathers in one number."""
    flat = torch.full((1, 1024), 1 / 32)
    project = Hadamard(1024, 64, 0)
    assert 0.5 < float(project(flat).square().sum()) < 1.5
    project._signs = torch.ones(1024)
    norm = float(project(flat).square().sum())
    assert norm < 1e-6 or norm > 10


def test_no_more_numbers_than_asked_for_are_kept_as_they_are():
    x = torch.randn(2, 10)
    assert isinstance(make_projector("hadamard", 10, 16), Identity)
    assert torch.equal(make_projector("rademacher", 10, 10)(x), x)
    assert make_projector("hadamard", 17, 16)(torch.randn(2, 17)).shape == (2, 16)
    with pytest.raises(UserError, match="for vectors of 17 numbers, not 10"):
        make_projector("hadamard", 17, 16)(x)
    with pytest.raises(UserError, match="must be one of none, rademacher, hadamard"):
        make_projector("fourier", 10, 4)
    with pytest.raises(UserError, match="at least 1"):
        make_projector("hadamard", 10, 0)
