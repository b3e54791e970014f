"""Conformance cases that a new family, codec, runtime or sampler inherits."""
