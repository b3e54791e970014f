"""Both runtimes against the cases that every runtime must pass."""

import pytest

from allocator.errors import TargetError
from allocator.export.gguf.runtime import GGUF_RUNTIME
from allocator.export.runtimes import RUNTIMES, register_runtime, runtime_named
from allocator.export.safetensors.runtime import SAFETENSORS_RUNTIME
from allocator.export.tensors import EncodedTensors
from allocator.targets import TARGETS, register_target
from allocator.testing.runtimes import RuntimeCase, RuntimeConformance


class TestGguf(RuntimeConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, case):
        made, other = case("deepseek", "gguf"), case("deepseek", "safetensors")
        return RuntimeCase(
            GGUF_RUNTIME,
            EncodedTensors(made.encodings, made.allocation(formats=("BF16",))),
            made.scorer,
            foreign=other.allocation(),
            tolerance=0.05,  # random weights: 8-bit activations flip their routing
        )


class TestSafetensors(RuntimeConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, case):
        made = case("qwen3", "safetensors")
        source = EncodedTensors(made.encodings, made.allocation())
        return RuntimeCase(SAFETENSORS_RUNTIME, source, made.scorer)


class TestGgufAllocationAsSafetensors(RuntimeConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, case):
        made = case("deepseek", "gguf")
        source = EncodedTensors(made.encodings, made.allocation())
        return RuntimeCase(SAFETENSORS_RUNTIME, source, made.scorer)


def test_every_target_has_a_runtime():
    assert RUNTIMES.keys() == TARGETS.keys()
    assert all(runtime.target is TARGETS[name] for name, runtime in RUNTIMES.items())


def test_a_name_is_taken_once():
    class Other(type(GGUF_RUNTIME)):
        pass

    class OtherTarget(type(GGUF_RUNTIME.target)):
        pass

    register_runtime(GGUF_RUNTIME)  # again, which changes nothing
    with pytest.raises(TargetError, match="registered already"):
        register_runtime(Other())
    with pytest.raises(TargetError, match="registered already"):
        register_target(OtherTarget())
    with pytest.raises(TargetError, match="unknown container 'onnx'; known: gguf, safetensors"):
        runtime_named("onnx")
