"""Images in, bfloat16 out, with and without a cache."""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmvision_export import VisionEncoder
from mmvision_export.core.errors import InputError, NotFiniteError
from mmvision_export.integrations.embeds_cache import CacheCounts, EmbedsCache
from mmvision_export.integrations.image_embedder import GivenImage, ImageEmbedder
from mmvision_export.integrations.image_embeds import ImageEmbeds
from mmvision_export.models.minimax_m3_vl.preprocess import patches_from_image
from tests.support.errors import refused
from tests.support.images import natural

SIZES = [(64, 96), (120, 80), (200, 60)]


@pytest.fixture(scope="module")
def encoder(exported: Path) -> Iterator[VisionEncoder]:
    with VisionEncoder.open(exported, backend="onnxruntime-cpu") as opened:
        yield opened


def images() -> list[Image.Image]:
    return [natural(width, height) for width, height in SIZES]


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def bits(embeds: list[ImageEmbeds]) -> list[np.ndarray]:
    return [each.bits for each in embeds]


def equal(first: list[ImageEmbeds], second: list[ImageEmbeds]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a.bits, b.bits) and a.grid_thw == b.grid_thw
        for a, b in zip(first, second, strict=True)
    )


class Counting:
    """Counts the images that reach the encoder."""

    def __init__(self, encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = 0
        encode = encoder.encode

        def counted(batch: Any) -> Any:
            self.images += len(batch.grid)
            return encode(batch)

        monkeypatch.setattr(encoder, "encode", counted)


def test_it_gives_the_encoders_own_embeddings_rounded(encoder: VisionEncoder) -> None:
    embeds = ImageEmbedder(encoder).encode_images(images())
    wanted = [torch.from_numpy(each).to(torch.bfloat16) for each in encoder.encode_images(images())]
    assert all(torch.equal(a.tensor(), b) for a, b in zip(embeds, wanted, strict=True))
    assert [t * h * w // 4 for t, h, w in (each.grid_thw for each in embeds)] == [
        each.shape[0] for each in embeds
    ]
    # The control: the images in another order.
    assert not all(
        a.shape == b.shape and torch.equal(a.tensor(), b)
        for a, b in zip(embeds, wanted[::-1], strict=True)
    )


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_hit_equals_the_miss_to_the_bit_and_runs_nothing(
    place: str, encoder: VisionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(encoder, monkeypatch)
    cache = (
        EmbedsCache() if place == "memory" else EmbedsCache(memory_bytes=0, folder=tmp_path / "c")
    )
    embedder = ImageEmbedder(encoder, cache=cache)
    miss = embedder.encode_images(images())
    assert counting.images == 3
    assert equal(miss, ImageEmbedder(encoder).encode_images(images()))
    before = counting.images
    assert equal(embedder.encode_images(images()), miss)
    assert equal(embedder.encode_images(images()[::-1]), miss[::-1])
    assert counting.images == before


def test_files_bytes_and_pillow_images_give_the_same(
    encoder: VisionEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(images()[0]))
    for cache in (None, EmbedsCache()):
        embedder = ImageEmbedder(encoder, cache=cache)
        given: list[GivenImage] = [images()[0], path, path.read_bytes(), Image.open(path)]
        embeds = [embedder.encode_images([each])[0] for each in given]
        assert all(equal([each], embeds[:1]) for each in embeds[1:])


def test_one_image_several_times_is_encoded_once(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(encoder, monkeypatch)
    image, other = images()[:2]
    embeds = ImageEmbedder(encoder, cache=EmbedsCache()).encode_images([image, other, image])
    assert counting.images == 2
    assert np.array_equal(embeds[0].bits, embeds[2].bits)
    assert embeds[0].shape != embeds[1].shape


def test_one_changed_pixel_is_another_image(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(encoder, monkeypatch)
    embedder = ImageEmbedder(encoder, cache=EmbedsCache())
    image = images()[0]
    embedder.encode_images([image])
    other = image.copy()
    other.putpixel((0, 0), tuple(255 - level for level in image.getpixel((0, 0))))  # type: ignore[union-attr]
    assert not np.array_equal(
        embedder.encode_images([other])[0].bits, embedder.encode_images([image])[0].bits
    )
    # The same bytes, with the sides exchanged.
    turned = Image.frombytes("RGB", image.size[::-1], image.tobytes())
    embedder.encode_images([turned])
    assert counting.images == 3


def test_orientation_is_part_of_an_image(encoder: VisionEncoder) -> None:
    embedder = ImageEmbedder(encoder, cache=EmbedsCache())
    content = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    images()[0].save(content, "PNG", exif=exif)
    turned = embedder.encode_images([Image.open(content)])
    upright = embedder.encode_images([images()[0].transpose(Image.Transpose.ROTATE_270)])
    assert equal(turned, upright)
    assert not equal(turned, embedder.encode_images(images()[:1]))


def test_other_preprocessing_other_weights_other_graphs_have_other_keys(
    exported: Path, encoder: VisionEncoder, tmp_path: Path
) -> None:
    from mmvision_export.export.onnx_export import export_model_directory
    from mmvision_export.models.weights import WeightSource
    from tests.support.configs import HEAD_DIM_80

    export_model_directory(WeightSource(random_config=HEAD_DIM_80, seed=2), tmp_path / "other")
    cache = EmbedsCache()
    content = png(images()[0])
    first = ImageEmbedder(encoder, cache=cache).encode_images([content])
    variants: list[tuple[Path, dict[str, Any]]] = [
        (tmp_path / "other", {}),
        (exported, {"resize": "long-side", "max_long_side": 1036}),
        (exported, {"backend": "openvino"}),
    ]
    for number, (path, options) in enumerate(variants):
        options = {"backend": "onnxruntime-cpu", **options}
        with VisionEncoder.open(path, **options) as other:
            embeds = ImageEmbedder(other, cache=cache).encode_images([content])
            assert cache.counts == CacheCounts(misses=number + 2), options
            assert equal(embeds, ImageEmbedder(other).encode_images([content]))
    with VisionEncoder.open(exported, backend="onnxruntime-cpu", threads=1) as same:
        # The control: the same function, opened anew.
        assert equal(ImageEmbedder(same, cache=cache).encode_images([content]), first)
        assert cache.counts.memory_hits == 1


def _encode(exported: str, folder: str, queue: Any) -> None:
    with VisionEncoder.open(exported, backend="onnxruntime-cpu") as encoder:
        cache = EmbedsCache(memory_bytes=0, folder=folder)
        embeds = ImageEmbedder(encoder, cache=cache).encode_images(images())
        queue.put(([each.bits for each in embeds], cache.counts))


def test_another_process_hits_what_this_one_made(
    exported: Path, encoder: VisionEncoder, tmp_path: Path
) -> None:
    miss = ImageEmbedder(encoder, cache=EmbedsCache(folder=tmp_path)).encode_images(images())
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=_encode, args=(str(exported), str(tmp_path), queue))
    worker.start()
    theirs, counts = queue.get(timeout=120)
    worker.join(60)
    assert counts == CacheCounts(disk_hits=3)
    assert all(np.array_equal(a, b) for a, b in zip(theirs, bits(miss), strict=True))


def test_a_poisoned_entry_is_made_anew(encoder: VisionEncoder, tmp_path: Path) -> None:
    miss = ImageEmbedder(encoder, cache=EmbedsCache(folder=tmp_path)).encode_images(images())
    first, second, third = sorted(tmp_path.glob("*.embeds"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())  # the whole entry of another image
    second.write_bytes(content[:100])
    third.write_bytes(third.read_bytes()[:-1] + b"\x7f")
    cache = EmbedsCache(folder=tmp_path)
    assert equal(ImageEmbedder(encoder, cache=cache).encode_images(images()), miss)
    assert cache.counts == CacheCounts(misses=3, damaged=3)
    again = EmbedsCache(folder=tmp_path)
    assert equal(ImageEmbedder(encoder, cache=again).encode_images(images()), miss)
    assert again.counts == CacheCounts(disk_hits=3)


def test_patches_of_others_are_cached_by_their_values(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(encoder, monkeypatch)
    embedder = ImageEmbedder(encoder, cache=EmbedsCache())
    made = [patches_from_image(image, encoder.preprocessor) for image in images()]
    pixels = np.concatenate([patches for patches, _ in made])
    grid = np.array([row for _, row in made])
    miss = embedder.encode_patches(pixels, grid)
    assert equal(miss, ImageEmbedder(encoder).encode_images(images()))
    before = counting.images
    assert equal(embedder.encode_patches(made[1][0], grid[1:2]), miss[1:2])
    assert counting.images == before
    embedder.encode_patches(made[1][0] + np.float32(1e-3), grid[1:2])
    # The same patches, laid out another way.
    embedder.encode_patches(made[1][0], grid[1:2][:, [0, 2, 1]])
    assert counting.images == before + 2


def test_prepared_images_give_the_same(encoder: VisionEncoder) -> None:
    for cache in (None, EmbedsCache()):
        embedder = ImageEmbedder(encoder, cache=cache)
        prepared = [embedder.prepare(image) for image in images()]
        assert equal(embedder.encode_prepared(prepared), embedder.encode_images(images()))
        assert [each.num_patches for each in prepared] == [
            4 * each.shape[0] for each in embedder.encode_images(images())
        ]


def test_an_image_that_cannot_be_read_is_named(encoder: VisionEncoder, tmp_path: Path) -> None:
    for cache in (None, EmbedsCache()):
        embedder = ImageEmbedder(encoder, cache=cache)
        with refused(InputError, "image 1", reason="unreadable"):
            embedder.encode_images([images()[0], b"no image"])
        with refused(InputError, "image 1", reason="missing"):
            embedder.encode_images([images()[0], tmp_path / "none.png"])
        with refused(InputError, "image 0", reason="unsafe"):
            ImageEmbedder(encoder, cache=cache, max_pixels=10).encode_images([png(images()[0])])
        with refused(InputError, reason="missing"):
            embedder.encode_images([])
    huge = tmp_path / "huge.png"
    huge.write_bytes(png(images()[0]))
    small = ImageEmbedder(encoder, max_pixels=64 * 96)
    small.encode_images([huge])  # the control
    os.truncate(huge, (64 << 20) + 8 * 64 * 96 + 1)  # a sparse file
    with refused(InputError, "image 0", reason="unsafe"):
        small.encode_images([huge])


def test_embeddings_that_are_not_finite_are_never_cached(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EmbedsCache()
    embedder = ImageEmbedder(encoder, cache=cache)
    encode = encoder.encode

    def spoiled(batch: Any) -> Any:
        per_image: list[Any] = batch.grid.split(encode(batch))
        per_image[1] = None
        raise NotFiniteError("image 1", images=[1], image_embeds=per_image)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode", spoiled)
        with pytest.raises(NotFiniteError) as caught:
            embedder.encode_images([*images(), images()[1]])
    assert caught.value.images == [1, 3]
    good = caught.value.image_embeds
    embeds = embedder.encode_images(images())
    assert equal([good[0], good[2]], [embeds[0], embeds[2]])
    assert cache.counts.memory_hits == 2  # of images 0 and 2, and not of 1


def test_it_needs_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, mmvision_export.integrations.image_embedder;"
        "print(sorted({'torch', 'onnx', 'safetensors', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
