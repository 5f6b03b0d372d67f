"""Photos and masks of every kind are decoded; hostile bytes give PortraitError and nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from lib_portrait.errors import PortraitError
from lib_portrait.faces import images
from lib_portrait.faces.images import FORMATS, MIN_SIDE, decode_image, decode_mask, decode_photo
from lib_portrait.request import Limits

LIMITS = Limits(photo_pixels=1_000_000, photo_bytes=2**20)
RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def halves(width: int = 48, height: int = 64) -> Image.Image:
    """Red above, blue below, a green corner at the top left: no rotation or mirroring leaves it as it is."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (0, height // 2, width, height))
    image.paste(GREEN, (0, 0, width // 4, height // 4))
    return image


def near(pixel, colour, tolerance: int = 24) -> bool:
    return bool(np.abs(np.asarray(pixel, int) - colour).max() <= tolerance)


def assert_halves(image: np.ndarray, tolerance: int = 24) -> None:
    assert image.shape == (64, 48, 3)
    assert image.dtype == np.uint8
    assert near(image[4, 4], GREEN, tolerance)
    assert near(image[4, 40], RED, tolerance)
    assert near(image[60, 4], BLUE, tolerance)


KINDS = [
    ("PNG", {}),
    ("JPEG", {"quality": 95}),
    ("BMP", {}),
    ("GIF", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    pytest.param("WEBP", {"lossless": True}, marks=pytest.mark.skipif(not features.check("webp"), reason="no WebP")),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_formats_users_have_are_read(kind, options):
    assert_halves(decode_image(encoded(halves(), kind, **options), "photo", LIMITS))


TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # the undoing of the rotation by 270 degrees that orientation 6 asks for
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotation_is_applied(kind, orientation):
    turn = TURNS[orientation]
    stored = halves() if turn is None else halves().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    assert_halves(decode_image(encoded(stored, kind, exif=exif.tobytes(), **options), "photo", LIMITS))


def test_unreadable_exif_does_not_lose_the_photo():
    data = encoded(halves(), "JPEG", quality=95, exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff\xff\xff")
    assert_halves(decode_image(data, "photo", LIMITS))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_over_grey(mode):
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    if mode == "PA":
        image = image.convert("RGB").quantize(4).convert("PA")
        image.putalpha(Image.fromarray(np.repeat([[0] * 32 + [255] * 32], 64, 0).astype(np.uint8)))
        data = encoded(image.convert("RGBA"))
    else:
        data = encoded(image.convert(mode))
    decoded = decode_image(data, "photo", LIMITS)
    assert near(decoded[5, 5], (128, 128, 128), 1)
    assert near(decoded[5, 60], (255, 255, 255), 1)


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_counts_as_transparency(mode):
    image = Image.new("RGB", (64, 64), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 32, 64))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    corner = image.getpixel((0, 0))
    decoded = decode_image(encoded(image, transparency=corner), "photo", LIMITS)
    assert near(decoded[5, 5], (128, 128, 128), 1)
    assert near(decoded[5, 60], (255, 255, 255), 1)


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr"])
def test_palettes_and_print_colours_become_rgb(mode):
    data = encoded(halves().quantize(8), "PNG") if mode == "P" else encoded(halves().convert(mode), "JPEG", quality=95)
    assert_halves(decode_image(data, "photo", LIMITS), tolerance=40)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_greyscale_becomes_rgb(mode):
    image = Image.new(mode, (40, 40), 0)
    image.paste(255, (20, 0, 40, 40))
    decoded = decode_image(encoded(image), "photo", LIMITS)
    assert decoded.shape == (40, 40, 3)
    assert decoded[0, 0].max() == 0
    assert decoded[0, 39].min() == 255


def test_sixteen_bits_keep_their_contrast():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    for kind in ("PNG", "TIFF"):
        decoded = decode_image(encoded(Image.fromarray(ramp), kind), "photo", LIMITS)
        assert np.abs(decoded[0, :, 0].astype(int) - ramp[0] / 257).max() <= 1


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_floating_point_pictures_are_read(white):
    ramp = np.linspace(0, white, 64, dtype=np.float32)[None].repeat(64, 0)
    decoded = decode_image(encoded(Image.fromarray(ramp), "TIFF"), "photo", LIMITS)
    assert decoded[0, 0, 0] == 0
    assert decoded[0, -1, 0] == 255


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_used(kind):
    others = [Image.new("RGB", (48, 64), (0, 0, 0)) for _ in range(2)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(halves(), kind, save_all=True, append_images=others, **options)
    pixels, notices = decode_photo(data, "photo", LIMITS)
    assert_halves(pixels)
    assert notices == (f"only the first {'page of the file' if kind == 'TIFF' else 'frame of the animation'} is used",)
    assert decode_photo(encoded(halves(), kind, **options), "photo", LIMITS)[1] == ()


def test_a_phone_s_depth_map_behind_its_photo_is_no_animation():
    data = encoded(halves(), "MPO", quality=95, save_all=True, append_images=[Image.new("RGB", (48, 64))])
    pixels, notices = decode_photo(data, "photo", LIMITS)
    assert_halves(pixels)
    assert notices == ()


def test_damage_behind_the_first_frame_does_not_lose_the_photo():
    data = encoded(halves(), "GIF", save_all=True, append_images=[Image.new("RGB", (48, 64), RED)])
    alone = encoded(halves(), "GIF")
    assert_halves(decode_image(data[: len(alone) + 8], "photo", LIMITS))


def heic(image: Image.Image, *more: Image.Image, **options) -> bytes:
    """A HEIC file of these pictures; the test is skipped where nothing reads it."""
    package = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    file = package.from_pillow(image)
    for one in more:
        file.add_from_pillow(one)
    out = io.BytesIO()
    file.save(out, quality=95, **options)
    return out.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heic_is_read_and_turned_once(orientation):
    turn = TURNS[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = heic(halves() if turn is None else halves().transpose(turn), exif=exif.tobytes())
    assert_halves(decode_image(data, "photo", LIMITS))


def test_of_several_pictures_in_heic_the_main_one_is_used():
    pixels, notices = decode_photo(heic(halves(), Image.new("RGB", (64, 64))), "photo", LIMITS)
    assert_halves(pixels)
    assert notices == ("only the main picture of the file is used",)


def test_limits_hold_for_heic():
    with pytest.raises(PortraitError, match="more than 0.001 million pixels"):
        decode_image(heic(halves()), "photo", Limits(photo_pixels=1000))
    for share in (0.1, 0.5, 0.9):
        data = heic(halves())
        with pytest.raises(PortraitError, match="damaged"):
            decode_image(data[: int(share * len(data))], "photo", LIMITS)


HEIC_START = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(100)


def test_where_heic_cannot_be_read_the_package_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pillow_heif" else find(name, *rest)
    )
    with pytest.raises(PortraitError, match="^photo: it is a HEIC picture.*pip install --no-deps pillow-heif.*JPEG"):
        decode_image(HEIC_START, "photo", LIMITS)
    with pytest.raises(PortraitError, match="Use an undamaged file of type") as caught:
        decode_image(b"nothing" * 10, "photo", LIMITS)
    assert "HEIC" not in caught.value.remedy


def test_a_package_for_heic_that_does_not_start_is_not_the_photo_s_fault(monkeypatch):
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")

    def broken(name):
        raise ImportError("libheif.so.1 is missing")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(PortraitError, match="pillow-heif, which reads these, does not start.*libheif.*pip install"):
        decode_image(HEIC_START, "photo", LIMITS)


def test_avif_is_not_taken_for_heic():
    """Its files name brands of HEIC, too."""
    avif = b"\0\0\0 ftypavif\0\0\0\0avifmif1miafMA1B"
    assert not images._is_heic(avif)
    assert not images._is_heic(avif.replace(b"ftypavif", b"ftypmif1"))
    assert images._is_heic(HEIC_START)
    assert not images._is_heic(b"\0\0\0\x18ftypmp42\0\0\0\0mp41isom")
    if features.check("avif"):
        assert_halves(decode_image(encoded(halves(), "AVIF", quality=95), "photo", LIMITS))


def test_the_package_for_heic_is_imported_for_heic_alone():
    code = (
        "import io, sys; from PIL import Image; from lib_portrait.faces.images import decode_image; "
        "from lib_portrait.request import Limits; out = io.BytesIO(); Image.new('RGB', (40, 40)).save(out, 'PNG'); "
        "decode_image(out.getvalue(), 'photo', Limits()); print('pillow_heif' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_sizes_outside_the_limits_are_refused():
    small = encoded(Image.new("RGB", (MIN_SIDE - 1, 200)))
    with pytest.raises(PortraitError, match=rf"^identities\[0\]: the image is {MIN_SIDE - 1}x200 pixels.*{MIN_SIDE}"):
        decode_image(small, "identities[0]", LIMITS)
    decode_image(encoded(Image.new("RGB", (MIN_SIDE, MIN_SIDE))), "photo", LIMITS)
    long = encoded(Image.new("1", (40_000, 32)))
    with pytest.raises(PortraitError, match="40000x32"):
        decode_image(long, "photo", Limits())


def test_empty_and_oversized_files_are_refused():
    with pytest.raises(PortraitError, match="^photo: the file is empty"):
        decode_image(b"", "photo", LIMITS)
    with pytest.raises(PortraitError, match="^photo: the file is larger than 1 MiB"):
        decode_image(bytes(LIMITS.photo_bytes + 1), "photo", LIMITS)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [1_001, 11_000, 60_000, 2**31 - 1])
def test_decompression_bombs_are_refused_from_their_header(side, monkeypatch):
    def decoded(self):
        raise AssertionError("the picture was decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", decoded)
    with pytest.raises(PortraitError, match="^photo: the image has more than 1 million pixels"):
        decode_image(png_that_claims(side, side), "photo", LIMITS)


def test_what_phones_make_is_within_the_limits(monkeypatch):
    """200 million pixels, above the limit that Pillow has of its own."""
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: (_ for _ in ()).throw(OSError("reached")))
    with pytest.raises(PortraitError, match="reached"):
        decode_image(png_that_claims(16_320, 12_240), "photo", Limits())


def test_the_remedy_names_a_setting_only_where_there_is_one():
    data = png_that_claims(1_001, 1_001)
    with pytest.raises(PortraitError) as caught:
        decode_image(data, "photo", LIMITS)
    assert caught.value.remedy == "Scale it down first."
    with pytest.raises(PortraitError) as caught:
        decode_image(data, "photo", Limits(photo_pixels=10**6, page="Settings > Portrait"))
    assert (
        caught.value.remedy
        == 'Scale it down first, or raise "Size of a photo, at most, in megapixels" in Settings > Portrait.'
    )
    with pytest.raises(PortraitError, match='or raise "Size of a photo, at most, in MiB" in Settings > Portrait'):
        decode_image(bytes(2000), "photo", Limits(photo_bytes=1000, page="Settings > Portrait"))


FOREIGN = {
    "text": b"hello, this is a text file and no picture" * 10,
    "html": b"<!doctype html><html><body>404 Not Found</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"></svg>',
    "pdf": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 200 200\n%%EndComments\nshowpage\n",
    "ppm": b"P6 64 64 255\n" + bytes(64 * 64 * 3),
    "icon": b"\x00\x00\x01\x00\x01\x00\x10\x10\x00\x00\x01\x00\x20\x00" + bytes(40),
    "zeros": bytes(1000),
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_kinds_are_refused_by_name_and_remedy(kind):
    with pytest.raises(PortraitError, match="^photo: it is not an image that can be read.*PNG, JPEG"):
        decode_image(FOREIGN[kind], "photo", LIMITS)


def samples() -> dict[str, bytes]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    alpha = picture.convert("RGBA")
    alpha.putalpha(picture.convert("L"))
    return {
        "PNG": encoded(alpha),
        "JPEG": encoded(picture, "JPEG", exif=Image.Exif().tobytes()),
        "GIF": encoded(picture, "GIF", save_all=True, append_images=[picture]),
        "TIFF": encoded(picture, "TIFF", compression="tiff_deflate"),
        "WEBP": encoded(alpha, "WEBP"),
        "BMP": encoded(picture, "BMP"),
    }


SAMPLES = samples()


def refused_or_decoded(data: bytes) -> None:
    for decode in (decode_image, decode_mask):
        try:
            assert decode(data, "photo", LIMITS).size
        except PortraitError as error:
            assert error.field == "photo"
            assert error.remedy


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_portrait_error(data):
    refused_or_decoded(data)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.floats(0, 1))
def test_truncated_files_raise_nothing_but_portrait_error(kind, share):
    refused_or_decoded(SAMPLES[kind][: int(len(SAMPLES[kind]) * share)])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8))
def test_corrupted_files_raise_nothing_but_portrait_error(kind, changes):
    data = bytearray(SAMPLES[kind])
    for place, value in changes:
        data[int((len(data) - 1) * place**2)] = value  # squared: headers are where the decoders are led astray
    refused_or_decoded(bytes(data))


def test_half_a_photo_is_refused():
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP"):
        with pytest.raises(PortraitError, match="damaged|not an image"):
            decode_image(SAMPLES[kind][: len(SAMPLES[kind]) // 2], "photo", LIMITS)


def test_no_loader_that_starts_other_programs_is_open():
    assert not {"EPS", "PDF", "PSD", "WMF", "FITS", "ICNS", "MSP"} & set(FORMATS)


def test_a_mask_is_what_is_white():
    image = Image.new("L", (20, 10), 0)
    image.paste(255, (0, 0, 10, 10))
    image.paste(128, (10, 0, 12, 10))
    mask = decode_mask(encoded(image), "mask", LIMITS)
    assert mask.shape == (10, 20)
    assert mask.dtype == np.float32
    assert mask[0].tolist() == [1.0] * 10 + [pytest.approx(128 / 255)] * 2 + [0.0] * 8


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (9, 99, 200)])
def test_in_a_transparent_mask_the_strokes_count_whatever_their_colour(colour):
    image = Image.new("RGBA", (20, 10), (*colour, 0))
    image.paste((*colour, 255), (0, 0, 10, 10))
    mask = decode_mask(encoded(image), "mask", LIMITS)
    assert mask[0].tolist() == [1.0] * 10 + [0.0] * 10


def test_a_mask_with_a_solid_alpha_channel_is_read_by_its_colours():
    image = Image.new("RGBA", (4, 1), (0, 0, 0, 255))
    image.putpixel((0, 0), (255, 255, 255, 255))
    assert decode_mask(encoded(image), "mask", LIMITS)[0].tolist() == [1, 0, 0, 0]


def test_a_mask_of_several_pictures_is_refused():
    data = encoded(Image.new("L", (40, 40), 255), "GIF", save_all=True, append_images=[Image.new("L", (40, 40), 0)])
    with pytest.raises(PortraitError, match="^mask: the file holds more than one picture. Save .* PNG"):
        decode_mask(data, "mask", LIMITS)


@pytest.mark.parametrize("image", [Image.new("L", (20, 10), 0), Image.new("RGBA", (20, 10), (255, 255, 255, 0))])
def test_an_empty_mask_is_refused(image):
    with pytest.raises(PortraitError, match="^mask: the mask is empty"):
        decode_mask(encoded(image), "mask", LIMITS)
