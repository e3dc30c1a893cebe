"""A stand-in for the timing caches of TensorRT's builder, by the rules of NvInfer.h (`ITimingCache`).

The content is `RELEASE/GPU:` and the names of what was timed. A cache of another GPU is not taken with strict
verification, and not combined. Of one of another release, or of what is no cache, an empty cache is made: so
TensorRT-RTX 1.7 does, with a warning.
"""

from __future__ import annotations


class TimingCache:
    def __init__(self, header: bytes, timed: set[bytes]) -> None:
        self.header = header
        self.timed = timed

    def combine(self, other: TimingCache, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and other.header != self.header:
            return False
        self.timed |= other.timed
        return True

    def serialize(self) -> bytes:
        return self.header + b":" + b",".join(sorted(self.timed))


class Config:
    """A builder's configuration, as far as timings are concerned."""

    def __init__(self, header: bytes) -> None:
        self.header = header
        self.cache: TimingCache | None = None

    def create_timing_cache(self, content: bytes) -> TimingCache:
        header, _, timed = content.partition(b":")
        if header.partition(b"/")[0] != self.header.partition(b"/")[0]:
            return TimingCache(self.header, set())
        return TimingCache(header, {each for each in timed.split(b",") if each})

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert self.cache is None, "NvInfer.h does not say what a second cache does"
        if not ignore_mismatch and cache.header != self.header:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        assert self.cache is not None
        return self.cache


class Builder:
    """A builder of one release on one GPU."""

    def __init__(self, header: bytes = b"10.13/sm89") -> None:
        self.header = header

    def create_builder_config(self) -> Config:
        return Config(self.header)

    def build(self, content: bytes, *timed: bytes) -> Config:
        """The configuration after a build that read a cache and timed some more."""
        config = Config(self.header)
        cache = config.create_timing_cache(content)
        assert config.set_timing_cache(cache, False)
        cache.timed |= set(timed)
        return config
