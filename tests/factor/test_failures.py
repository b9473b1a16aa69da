import pytest
import torch

from fxlrd.factor.failures import NotFiniteError, check_finite, failure, holds_everywhere


def raised(function):
    with pytest.raises(RuntimeError) as error:
        function()
    return error.value


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.linalg.LinAlgError("failed to converge"), "factorisation-failed"),
        (raised(lambda: torch.linalg.cholesky(-torch.eye(2))), "factorisation-failed"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"), "factorisation-failed"),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), "no-memory"),
        (MemoryError(), "no-memory"),
        (raised(lambda: torch.empty(2**60)), "no-memory"),
        (NotFiniteError("NaN"), "not-finite-factors"),
    ],
)
def test_failures_of_a_layers_algebra(error, code):
    reason = failure(error)
    assert reason.code == code
    assert "\n" not in str(reason)


def test_a_reason_quotes_the_message():
    assert "failed to converge" in str(failure(torch.linalg.LinAlgError("failed to converge")))
    assert len(str(failure(torch.linalg.LinAlgError("long " * 100)))) < 200


@pytest.mark.parametrize(
    "error", [raised(lambda: torch.ones(2) @ torch.ones(3)), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_exceptions_are_none(error):
    assert failure(error) is None


def test_numbers_that_are_not_finite():
    check_finite(torch.ones(2), torch.zeros(0))
    with pytest.raises(NotFiniteError, match="NaN or Inf in float16"):
        check_finite(torch.ones(2), torch.full((2,), torch.inf).half())


@pytest.mark.parametrize("shape", [(), (7,), (3, 0), (5, 2, 2)])
def test_entries_are_looked_at_some_at_a_time(shape, monkeypatch):
    monkeypatch.setattr("fxlrd.factor.failures._ENTRIES", 6)
    tensor = torch.ones(shape)
    assert holds_everywhere(torch.isfinite, tensor)
    for i in range(tensor.numel()):
        broken = tensor.clone()
        broken.view(-1)[i] = torch.nan
        assert not holds_everywhere(torch.isfinite, broken)
