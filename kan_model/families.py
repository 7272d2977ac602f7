"""Other KAN families, told by the names of their tensors, and KANX, which takes ours, by shapes.

A file of another family is refused in any case, because its tensors are not efficient-KAN's; this
table only lets the refusal say what the file looks like. Order matters: the first match wins.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Family:
    """A family and the fragments of key names that give it away.

    Attributes:
        name: What its users call it.
        marks: Each fragment occurs in some key.
        absent: None of these fragments occurs in any key.
    """

    name: str
    marks: tuple[str, ...]
    absent: tuple[str, ...] = ()


FAMILIES = (
    Family("BSRBF-KAN", ("rbf.grid", "base_weight")),
    Family("FasterKAN", ("rbf.inv_denominator",)),
    Family("FastKAN", ("rbf.grid",)),
    Family("MatrixKAN", ("act_fun.", ".basis_matrix")),
    Family("pykan", ("act_fun.", ".coef")),
    Family("Wav-KAN", ("wavelet_weights", "translation")),
    Family("torch-conv-kan (fully connected)", ("prelu.weight", "spline_weight")),
    Family("torch-conv-kan", ("base_conv.", "spline_conv.")),
    Family("torch-conv-kan", ("poly_conv.",)),
    Family("torch-conv-kan", ("relukan_conv.",)),
    Family("torch-conv-kan", ("wavelet_conv.",)),
    Family("a polynomial KAN of torch-conv-kan", ("poly_weight",)),
    Family("a Gram-polynomial KAN of torch-conv-kan", ("grams_basis_weights",)),
    Family("a Bernstein-polynomial KAN of torch-conv-kan", ("bernstein_coeffs",)),
    Family("ChebyKAN", ("cheby_coeffs",)),
    Family("JacobiKAN", ("jacobi_coeffs",)),
    Family("a Taylor-series KAN", ("taylor_coeffs",)),
    Family("FourierKAN", ("fouriercoeffs",), absent=("phase",)),
    Family("FourierKAN", ("fourier_coeffs",)),
    Family("SineKAN", ("phase", "amplitudes")),
    Family("SineKAN", ("phase", "base_fouriercoeffs")),
    Family("ReLU-KAN", ("phase_low", "equal_size_conv")),
    Family("RBF-KAN", ("centers", "weights"), absent=("base_weight",)),
    Family("a rational KAN (KAT)", ("weight_numerator", "weight_denominator")),
    Family("LKAN", ("coeff", "scale_base")),
)

_KANX = Family("KANX", ("base_weight", "spline_weight", "grid"))


def recognise(state: Mapping[str, Tensor]) -> Family | None:
    """Tell the family a state dict seems to come from; None when it resembles none known."""
    for family in FAMILIES:
        found = all(any(mark in key for key in state) for mark in family.marks)
        excluded = any(mark in key for mark in family.absent for key in state)
        if found and not excluded:
            return family
    for key, base in state.items():
        stem = key.removesuffix("base_weight")
        grid = state.get(stem + "grid")
        # KANX stores (in, out) and a grid without the outer knots, under efficient-KAN's names.
        if stem != key and grid is not None and base.dim() == grid.dim() == 2:
            spline = state.get(stem + "spline_weight")
            transposed = base.shape[0] == grid.shape[0] and base.shape[1] != grid.shape[0]
            unextended = spline is not None and spline.shape[-1] >= grid.shape[1]
            if unextended and (transposed or base.shape[0] == base.shape[1]):
                return _KANX
    return None
