"""Products of few rows with oneDNN's matrices, and of any number with ours of 16 bits."""

import pytest
import torch
from torch.nn.functional import gelu, linear

from handler.kernels import packed_linear
from handler.kernels.cpu import has_code_for, multiplies_pairs
from handler.kernels.packed_linear import in_panels, widened_product, with_few_rows
from handler.kernels.tiles import has_tiles


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    """In which there is code for oneDNN's matrices."""
    if request.param == torch.bfloat16 and not multiplies_pairs(torch.bfloat16):
        pytest.skip("no bfloat16 here")
    return request.param


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def narrow(request):
    if not has_code_for(request.param):
        pytest.skip("not on this CPU")
    return request.param


def never(inputs):
    raise AssertionError("a product of few rows")


def make(dtype, width, height, activation=None, biased=True):
    """A product with few rows, which oneDNN does not make, and the same in float64."""
    torch.manual_seed(0)
    weight = (torch.randn(height, width) / width**0.5).to(dtype)
    bias = torch.randn(height).to(dtype) if biased else None
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # oneDNN puts fewer rows together if there are more threads than small matrices have panels
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 256)
    torch.set_num_threads(threads)
    return with_few_rows(never, packed, bias, activation), exactly(weight, bias, activation)


def most_rows(dtype):
    """That oneDNN does not get."""
    return 32 if dtype == torch.bfloat16 and has_tiles() else 128


def exactly(weight, bias, activation):
    def exact(inputs):
        product = linear(inputs.double(), weight.double(), None if bias is None else bias.double())
        return product if activation is None else gelu(product, approximate=activation)

    return exact


def make_widened(dtype, width, height, activation=None, biased=True):
    """The same of 16 bits, by our code for any number of rows."""
    torch.manual_seed(0)
    weight = (torch.randn(height, width) / width**0.5).to(dtype)
    bias = torch.randn(height).to(dtype) if biased else None
    return widened_product(in_panels(weight), height, bias, activation), exactly(weight, bias, activation)


def agree(product, exact, inputs):
    outputs = product(inputs)
    assert outputs.dtype == inputs.dtype and outputs.is_contiguous()
    torch.testing.assert_close(outputs.double(), exact(inputs), rtol=torch.finfo(inputs.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("sizes", [(64, 64), (1088, 128), (96, 640), (576, 2560)])
def test_each_number_of_rows(dtype, threads, sizes):
    product, exact = make(dtype, *sizes)
    for rows in (*range(1, 33), *(rows for rows in (61, 127, 128) if rows <= most_rows(dtype))):
        agree(product, exact, torch.randn(rows, sizes[0]).to(dtype))


@pytest.mark.parametrize("height", [40, 63, 65, 100])
def test_matrices_that_do_not_fill_their_last_panel(dtype, height, threads):
    product, exact = make(dtype, 64, height)
    for rows in (1, 7, 17, 32):
        agree(product, exact, torch.randn(rows, 64).to(dtype))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation", [None, "tanh", "none"])
def test_bias_and_gelu(dtype, biased, activation):
    agree(*make(dtype, 96, 128, activation, biased), torch.randn(9, 96).to(dtype))


def test_inputs_of_any_shape_and_order(dtype):
    product, exact = make(dtype, 64, 128)
    agree(product, exact, torch.randn(3, 1, 5, 64).to(dtype))
    agree(product, exact, torch.randn(64, 7).to(dtype).t())
    agree(product, exact, torch.randn(4, 3, 128).to(dtype)[..., 64:])
    agree(product, exact, torch.randn(64).to(dtype))


def test_more_rows_and_none_are_left_to_the_other_product(dtype):
    product, _ = make(dtype, 64, 64)
    for rows in (0, most_rows(dtype) + 1):
        with pytest.raises(AssertionError, match="few rows"):
            product(torch.zeros(rows, 64, dtype=dtype))


@pytest.mark.parametrize(
    "change", [lambda x: x.double(), lambda x: x[..., :32], lambda x: x.to("meta"), lambda x: x.view(4, 128)]
)
def test_inputs_that_are_not_the_matrixs_are_left_to_the_other_product(dtype, change):
    product, _ = make(dtype, 64, 64)
    with pytest.raises(AssertionError, match="few rows"):
        product(change(torch.zeros(8, 64, dtype=dtype)))


def test_nan_and_infinity_stay_in_their_rows(dtype):
    product, _ = make(dtype, 64, 64, "tanh")
    inputs = torch.randn(8, 64).to(dtype)
    clean = product(inputs)
    inputs[3, 5], inputs[6, 7] = torch.nan, torch.inf
    outputs = product(inputs)
    others = [0, 1, 2, 4, 5, 7]
    assert torch.equal(outputs[others], clean[others]) and outputs[3].isnan().all()


@pytest.mark.parametrize("bias", [None, 300.0, -300.0])
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_an_order_that_is_another_is_left(dtype, bias, activation):
    """Also where a bias is much more than the product, or a GELU leaves nothing of it."""
    torch.manual_seed(0)
    weight = torch.randn(128, 64).to(dtype)
    bias = None if bias is None else torch.full((128,), bias, dtype=dtype)

    def product(inputs):
        return linear(inputs, weight, bias)

    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 256)
    assert with_few_rows(product, packed, bias, activation).__name__ == "multiply"
    assert with_few_rows(product, weight.to_mkldnn(), bias, activation) is product  # row by row


def test_a_matrix_that_tells_no_order_is_left(dtype):
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(128, 64, dtype=dtype), 256)
    assert with_few_rows(never, packed, None, None) is never


@pytest.mark.parametrize(
    "has_tiles, dtype, columns, found",
    [
        (True, torch.bfloat16, 96, [(32, 32), (64, 128)]),
        (True, torch.bfloat16, 48, [(64, 128)]),
        (False, torch.bfloat16, 96, [(64, 128)]),
        (True, torch.float32, 96, [(64, 128)]),
        (True, torch.float16, 96, []),
    ],
)
def test_which_orders_are_tried(monkeypatch, has_tiles, dtype, columns, found):
    monkeypatch.setattr(packed_linear, "has_code_for", lambda dtype: True)
    monkeypatch.setattr(packed_linear, "multiplies_pairs", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(packed_linear, "has_tiles", lambda: has_tiles)
    assert [(kernels.panel, kernels.most_rows) for kernels in packed_linear._kernels(dtype, columns)] == found


def test_each_order_is_tried_until_one_is_the_matrixs(dtype, monkeypatch):
    """Neither one that takes other memory nor one that gives other numbers is the last to be tried."""
    real = packed_linear._kernels(dtype, 64)

    def nothing(gelu):
        return lambda inputs, matrix, biases, outputs, *sizes: outputs.zero_()

    others = [packed_linear._Kernels(panel, 128, nothing) for panel in (7, 64)]
    monkeypatch.setattr(packed_linear, "_kernels", lambda dtype, columns: others + real)
    agree(*make(dtype, 64, 128), torch.randn(8, 64).to(dtype))


@pytest.mark.parametrize("height", [64, 96])
def test_columns_that_do_not_fill_tiles(dtype, height):
    torch.manual_seed(0)
    weight, inputs = torch.randn(height, 48).to(dtype), torch.randn(5, 48).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 256)
    product = with_few_rows(lambda inputs: linear(inputs, weight), packed, None, None)
    agree(product, exactly(weight, None, None), inputs)


@pytest.mark.skipif(not has_tiles(), reason="no AMX here")
def test_rows_in_tiles_are_the_same_whatever_is_beside_them(threads):
    product, _ = make(torch.bfloat16, 640, 96)
    inputs = torch.randn(32, 640).bfloat16()
    one_by_one = torch.cat([product(row) for row in inputs.split(1)])
    for rows in range(1, 33):
        assert torch.equal(one_by_one[:rows], product(inputs[:rows]))


@pytest.mark.parametrize("sizes", [(64, 64), (1088, 128), (96, 640), (1, 64), (600, 65), (37, 63), (70, 64)])
def test_widened_each_number_of_rows(narrow, threads, sizes):
    product, exact = make_widened(narrow, *sizes)
    for rows in (*range(1, 27), 128, 257, 700):
        agree(product, exact, torch.randn(rows, sizes[0]).to(narrow))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation", [None, "tanh", "none"])
def test_widened_bias_and_gelu(narrow, biased, activation):
    agree(*make_widened(narrow, 96, 100, activation, biased), torch.randn(9, 96).to(narrow))


def test_widened_inputs_of_any_shape_and_order(narrow):
    product, exact = make_widened(narrow, 64, 128)
    agree(product, exact, torch.randn(3, 1, 5, 64).to(narrow))
    agree(product, exact, torch.randn(64, 30).to(narrow).t())
    agree(product, exact, torch.randn(4, 3, 128).to(narrow)[..., 64:])
    agree(product, exact, torch.randn(64).to(narrow))
    assert product(torch.zeros(2, 0, 64, dtype=narrow)).shape == (2, 0, 128)


@pytest.mark.parametrize("rows", [4, 24])
def test_widened_a_row_is_the_same_whatever_is_beside_it(narrow, rows):
    product, _ = make_widened(narrow, 640, 128)
    inputs = torch.randn(rows, 640).to(narrow)
    assert torch.equal(torch.cat([product(row) for row in inputs.split(1)]), product(inputs))


def test_widened_nan_and_infinity_stay_in_their_rows(narrow):
    product, _ = make_widened(narrow, 64, 64, "tanh")
    for rows in (8, 40):
        inputs = torch.randn(rows, 64).to(narrow)
        clean = product(inputs)
        inputs[3, 5], inputs[6, 7] = torch.nan, torch.inf
        outputs = product(inputs)
        others = [row for row in range(rows) if row not in (3, 6)]
        assert torch.equal(outputs[others], clean[others]) and outputs[3].isnan().all()


@pytest.mark.parametrize(
    "change", [lambda x: x.double(), lambda x: x.float(), lambda x: x[..., :32], lambda x: x.to("meta")]
)
def test_widened_other_inputs_are_an_error(narrow, change):
    product, _ = make_widened(narrow, 64, 64)
    with pytest.raises(TypeError, match="for a matrix of 64 columns in torch"):
        product(change(torch.zeros(8, 64, dtype=narrow)))
