"""What every codec must do, as test cases that a codec's own test class inherits.

In: a codec, given by the fixture `codec`, and the names of its formats. Out: tests for pytest.
Invariant: encoded bytes are compared with what the format table says of them, with a second
implementation, and with the same weights encoded in another way.

    class TestMine(CodecConformance):
        formats = ("INT3", "INT5")

        @pytest.fixture(scope="class")
        @classmethod
        def codec(cls):
            return MY_CODEC  # registered
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest

from allocator.codecs import Bytes, Codec, Floats, Halves, codec_of
from allocator.errors import FormatError
from allocator.formats import Format, Importance, format_named

_ROWS, _WIDTH = 64, 2048
_ERROR_TOLERANCE = 0.02  # of `Format.gaussian_error`


class CodecConformance:
    """Tests of one codec, for each of its formats.

    Attributes:
        formats: names of all its formats.
    """

    formats: ClassVar[Sequence[str]] = ()

    @pytest.fixture(scope="class")
    @classmethod
    def codec(cls) -> Codec:
        """Gives the codec, which is registered while the tests run."""
        raise NotImplementedError("give a fixture `codec` and the names `formats`")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Runs a test that asks for `name` once for each format."""
        if "name" in metafunc.fixturenames:
            assert metafunc.cls is not None
            metafunc.parametrize("name", metafunc.cls.formats)

    @pytest.fixture
    def fmt(self, codec: Codec, name: str) -> Format:
        """Gives one of its formats."""
        return format_named(name)

    def test_all_formats_are_registered_with_it(self, codec: Codec) -> None:
        """Looks each format and its codec up by name."""
        assert {fmt.name for fmt in codec.formats} == {*self.formats}
        for fmt in codec.formats:
            assert format_named(fmt.name) is fmt
            assert codec_of(fmt) is codec
            assert codec.weights_per_second(fmt) > 0
            assert codec.preparation_seconds(fmt) >= 0

    def test_its_identity_names_package_and_version(self, codec: Codec) -> None:
        """Checks that the identity names the version: other versions may write other bytes."""
        assert codec.version
        assert codec.identity == f"{codec.package} {codec.version}"

    def test_bytes_are_as_many_as_the_format_says(self, codec: Codec, fmt: Format) -> None:
        """Compares with the format table."""
        for shape in ((3, 2 * fmt.block), (2, 3, fmt.block), (1, 5 * fmt.block), (0, 2, fmt.block)):
            data = codec.encode(_normal(*shape), fmt, np.ones(shape[-1], np.float32))
            assert data.dtype == np.uint8
            assert data.shape[:-1] == shape[:-1]
            assert data.nbytes == fmt.nbytes(shape)
            decoded = codec.decode(data, fmt)
            assert decoded.dtype == np.float32
            assert decoded.shape == shape

    def test_the_error_on_normal_weights(self, codec: Codec, fmt: Format) -> None:
        """Compares with `Format.gaussian_error`, on 64 rows of about 2048 bfloat16 weights."""
        weights = _bfloat16(_normal(_ROWS, _width(fmt)))
        decoded = codec.decode(codec.encode(weights, fmt, np.ones(_width(fmt), np.float32)), fmt)
        error = np.square(decoded - weights).sum() / np.square(weights).sum()
        assert error == pytest.approx(fmt.gaussian_error, rel=_ERROR_TOLERANCE, abs=1e-8), (
            f"{fmt.name}: gaussian_error is {error:.4g} as measured, {fmt.gaussian_error:.4g} in "
            "the format; write the measured one, if the codec is right"
        )

    def test_a_second_implementation_decodes_the_same(self, codec: Codec, fmt: Format) -> None:
        """Compares decoded values one by one."""
        weights = _normal(6, _width(fmt, 512))
        data = codec.encode(weights, fmt, _lognormal(weights.shape[-1]))
        second = codec.second_opinion(data, fmt)
        if second is None:
            pytest.skip(f"nobody else decodes {fmt.name}")
        np.testing.assert_array_equal(second, codec.decode(data, fmt))

    def test_what_was_decoded_is_encoded_again(self, codec: Codec, fmt: Format) -> None:
        """Checks that a second encoding loses far less: its values are on the format's grid."""
        weights, ones = _normal(16, _width(fmt, 512)), np.ones(_width(fmt, 512), np.float32)
        once = codec.decode(codec.encode(weights, fmt, ones), fmt)
        twice = codec.decode(codec.encode(once, fmt, ones), fmt)
        lost = np.square(twice - once).sum() / np.square(weights).sum()
        assert lost <= 0.5 * fmt.gaussian_error + 1e-12

    def test_zeros_stay_zeros(self, codec: Codec, fmt: Format) -> None:
        """Checks that zeros decode to zeros: a row without weights has no scale to divide by."""
        zeros = np.zeros((2, _width(fmt, 512)), np.float32)
        data = codec.encode(zeros, fmt, _lognormal(zeros.shape[-1]))
        assert not codec.decode(data, fmt).any()

    @pytest.mark.parametrize("threads", [2, 3])
    def test_threads_and_rows_do_not_change_the_bytes(
        self, codec: Codec, fmt: Format, threads: int
    ) -> None:
        """Compares with rows that are encoded one by one, under the importance of their matrix."""
        weights, importance = _normal(2, 5, fmt.block * 2), _lognormal(2, fmt.block * 2)
        alone = np.stack(
            [
                [codec.encode(row[None], fmt, channels)[0] for row in matrix]
                for matrix, channels in zip(weights, importance, strict=True)
            ]
        )
        np.testing.assert_array_equal(codec.encode(weights, fmt, importance), alone)
        np.testing.assert_array_equal(
            codec.encode(weights, fmt, importance, threads=threads), alone
        )
        np.testing.assert_array_equal(
            codec.encode(weights[0], fmt, importance[0], threads=threads), alone[0]
        )

    def test_importance_does_what_the_format_says(self, codec: Codec, fmt: Format) -> None:
        """Checks that importance is needed, lowers the weighted error, or changes nothing."""
        weights = _normal(16, _width(fmt, 512))
        importance, ones = _lognormal(weights.shape[-1]), np.ones(weights.shape[-1], np.float32)
        weighted = codec.encode(weights, fmt, importance)
        if fmt.importance is Importance.IGNORED:
            np.testing.assert_array_equal(weighted, codec.encode(weights, fmt))
            return
        errors = [
            float((np.square(codec.decode(data, fmt) - weights) * importance).sum())
            for data in (weighted, codec.encode(weights, fmt, ones))
        ]
        assert errors[0] < errors[1], (
            f"{fmt.name}: importance lowers no weighted error; use it, or declare "
            "Importance.IGNORED"
        )
        if fmt.importance is Importance.REQUIRED:
            with pytest.raises(FormatError, match=f"{fmt.name} needs an importance"):
                codec.encode(weights, fmt)
        else:
            assert (weighted != codec.encode(weights, fmt)).any()

    def test_rows_that_are_no_whole_blocks_are_refused(self, codec: Codec, fmt: Format) -> None:
        """Names the format, the row and the block."""
        if fmt.block == 1:
            pytest.skip("every row is whole blocks")
        width = fmt.block + fmt.block // 2
        with pytest.raises(FormatError, match=f"{fmt.name}.*{width}.*{fmt.block}"):
            codec.encode(_normal(2, width), fmt, np.ones(width, np.float32))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_weights_that_are_not_finite_are_refused(
        self, codec: Codec, fmt: Format, bad: float
    ) -> None:
        """Checks that weights that are not finite are refused."""
        weights = _normal(2, fmt.block)
        weights[1, fmt.block // 2] = bad
        with pytest.raises(FormatError, match="not finite"):
            codec.encode(weights, fmt, np.ones(fmt.block, np.float32))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
    def test_importance_that_is_no_weight_is_refused(
        self, codec: Codec, fmt: Format, bad: float
    ) -> None:
        """Checks that negative and not finite importance is refused."""
        importance = np.ones(fmt.block, np.float32)
        importance[fmt.block // 2] = bad
        with pytest.raises(FormatError, match="importance must be"):
            codec.encode(_normal(2, fmt.block), fmt, importance)

    def test_scales_are_read_and_written(self, codec: Codec, fmt: Format) -> None:
        """Reads back what was written, and finds the bytes unchanged under unchanged scales."""
        data, scales = self._with_scales(codec, fmt)
        np.testing.assert_array_equal(codec.with_scales(data, fmt, scales), data)
        others = _random_scales(scales)
        changed = codec.with_scales(data, fmt, others)
        assert changed.shape == data.shape
        assert changed.dtype == np.uint8
        stored = codec.scales(changed, fmt)
        assert stored is not None
        np.testing.assert_array_equal(stored, others)
        np.testing.assert_array_equal(codec.with_scales(changed, fmt, scales), data)

    def test_weights_are_linear_in_their_scales(self, codec: Codec, fmt: Format) -> None:
        """Compares decoded weights with sums of what one scale alone decodes to."""
        data, scales = self._with_scales(codec, fmt)
        units = np.eye(scales.shape[-1], dtype=np.float16)
        parts = [
            codec.decode(codec.with_scales(data, fmt, np.full_like(scales, unit)), fmt)
            for unit in units
        ]
        for given in (scales, _random_scales(scales), np.zeros_like(scales)):
            decoded = codec.decode(codec.with_scales(data, fmt, given), fmt)
            wide = np.repeat(given.astype(np.float32), fmt.block, axis=-2)
            terms = [wide[..., i] * part for i, part in enumerate(parts)]
            size = np.sum(np.abs(terms), axis=0)
            assert (np.abs(decoded - np.sum(terms, axis=0)) <= 1e-6 * size).all()
            second = codec.second_opinion(codec.with_scales(data[0], fmt, given[0]), fmt)
            if second is not None:
                np.testing.assert_array_equal(second, decoded[0])

    def test_scales_that_do_not_fit_are_refused(self, codec: Codec, fmt: Format) -> None:
        """Checks another type, another number, and scales that are not finite."""
        data, scales = self._with_scales(codec, fmt)
        wrong = (scales.astype(np.float32), scales[..., :0], np.full_like(scales, np.inf))
        for given in wrong:
            with pytest.raises(FormatError, match=f"{fmt.name}: scales are"):
                codec.with_scales(data, fmt, given)  # type: ignore[arg-type]

    def test_formats_without_scales_refuse_them(self, codec: Codec, fmt: Format) -> None:
        """Checks that nobody can write scales that nobody could read."""
        data = codec.encode(_normal(2, fmt.block), fmt, np.ones(fmt.block, np.float32))
        if codec.scales(data, fmt) is not None:
            pytest.skip(f"{fmt.name} has float16 scales")
        with pytest.raises(FormatError, match=f"{fmt.name} has no float16 scales"):
            codec.with_scales(data, fmt, np.zeros((2, 1, 1), np.float16))

    def _with_scales(self, codec: Codec, fmt: Format) -> tuple[Bytes, Halves]:
        """Returns encoded weights, `2 x 4 x bytes per row`, and their scales."""
        width = 3 * fmt.block
        data = codec.encode(_normal(2, 4, width), fmt, _lognormal(width))
        scales = codec.scales(data, fmt)
        if scales is None:
            pytest.skip(f"{fmt.name} has no float16 scales")
        assert scales.dtype == np.float16
        assert scales.shape[:-1] == (2, 4, 3)
        return data, scales

    def test_decoding_into_given_memory(self, codec: Codec, fmt: Format) -> None:
        """Decodes chosen rows, in their order, where the caller says."""
        data: Bytes = codec.encode(_normal(3, 4, fmt.block), fmt, np.ones(fmt.block, np.float32))
        out = np.full((2, 4, fmt.block), np.nan, np.float32)
        assert codec.decode(data[[2, 0]], fmt, out=out) is out
        np.testing.assert_array_equal(out, codec.decode(data, fmt)[[2, 0]])
        np.testing.assert_array_equal(
            codec.decode(data[:, ::2], fmt), codec.decode(data, fmt)[:, ::2]
        )


def _width(fmt: Format, least: int = _WIDTH) -> int:
    """Returns whole blocks."""
    return -(-least // fmt.block) * fmt.block


def _normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _random_scales(scales: Halves) -> Halves:
    return _normal(*scales.shape, seed=2).astype(np.float16)


def _lognormal(*shape: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).lognormal(sigma=2, size=shape).astype(np.float32)


def _bfloat16(weights: Floats) -> Floats:
    """Rounds to bfloat16, half to even."""
    bits = weights.view(np.uint32)
    rounded: Floats = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    return rounded
