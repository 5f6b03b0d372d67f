"""Photos and masks from the bytes users send. The bytes are hostile until decoded: nothing but PortraitError leaves."""

from __future__ import annotations

import importlib
import importlib.util
import io
from typing import Any

import numpy as np
import PIL
from PIL import Image

from lib_portrait.errors import PortraitError
from lib_portrait.request import Limits

# What cameras, phones and browsers write. Pillow's other loaders stay shut: some of them start other programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# What iPhones write is read by a package of its own. Its files name one of these brands, and so do those of AVIF, which
# name one of their own as well (ISO/IEC 23008-12).
HEIC, HEIC_PACKAGE = "HEIC", "pillow_heif"
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_START = 64
# Later ones need Pillow 11; the WebUI has 9.5.
HEIC_PIN = "pillow-heif" if int(PIL.__version__.split(".")[0]) > 11 else "pillow-heif==0.16.0"
MIN_SIDE = 32
MAX_SIDE = 32_000  # OpenCV's warpAffine addresses pixels with 16 bits
GREY = (128, 128, 128)

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, field: str, limits: Limits) -> np.ndarray:
    """The photo in a file's bytes, upright by its EXIF data, (H, W, 3) uint8 RGB.

    Transparency is laid over grey, of several pictures the first is taken, 16 bits and CMYK become 8-bit RGB. Raises
    PortraitError naming `field` for anything that is no such photo, or outside the limits.
    """
    return decode_photo(data, field, limits)[0]


def decode_photo(data: bytes, field: str, limits: Limits) -> tuple[np.ndarray, tuple[str, ...]]:
    """What `decode_image` gives, and what a user should know of it: clauses without a full stop."""
    image, notices = _open(data, field, limits)
    if min(image.size) < MIN_SIDE or max(image.size) > MAX_SIDE:
        raise PortraitError(
            field,
            f"the image is {image.width}x{image.height} pixels",
            f"Use one with sides from {MIN_SIDE} to {MAX_SIDE} pixels.",
        )
    try:
        return np.asarray(_upright(_flatten(image), image)), notices
    except Exception as error:
        raise _damaged(field, error) from error


def decode_mask(data: bytes, field: str, limits: Limits) -> np.ndarray:
    """The mask in a file's bytes, (H, W) float32 in [0, 1].

    With transparency in it, what is opaque belongs to the mask, whatever its colour; otherwise what is white does.
    Raises PortraitError as `decode_image` does, and for a mask that is empty or one of several pictures.
    """
    image, several = _open(data, field, limits)
    if several:
        raise PortraitError(field, "the file holds more than one picture", "Save the one that is the mask as PNG.")
    try:
        grey = _flatten(image).convert("L")
        if _has_alpha(image):
            alpha = image.convert("RGBA").getchannel("A")
            if np.asarray(alpha).min() < 255:
                grey = alpha
        mask = np.asarray(_upright(grey, image), dtype=np.float32) / 255
    except Exception as error:
        raise _damaged(field, error) from error
    if not mask.any():
        raise PortraitError(field, "the mask is empty", "Paint the region white (or opaque), or leave the mask out.")
    return mask


def _open(data: bytes, field: str, limits: Limits) -> tuple[Image.Image, tuple[str, ...]]:
    """The first picture, decoded, after the sizes of file and picture were held against the limits; and notices."""
    if not data:
        raise PortraitError(field, "the file is empty (0 bytes)", "Send the bytes of an image file.")
    if len(data) > limits.photo_bytes:
        raise PortraitError(
            field,
            f"the file is larger than {limits.photo_bytes // 2**20} MiB",
            limits.remedy("photo_bytes", "Use a smaller file of this picture"),
        )
    image = _recognised(data, field)
    if image.width * image.height > limits.photo_pixels:
        raise PortraitError(
            field,
            f"the image has more than {limits.photo_pixels / 1e6:g} million pixels ({image.width}x{image.height})",
            limits.remedy("photo_pixels", "Scale it down first"),
        )
    notices = _of_several(image)
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise _too_large(field, error) from error
    except Exception as error:
        raise _damaged(field, error) from error
    return image, notices


def _recognised(data: bytes, field: str) -> Image.Image:
    """The image with its header read. Raises PortraitError for what is none, or of a kind that is not read here.

    Pillow's readers are asked one by one, as `Image.open` does, which would refuse what phones make: it has a limit of
    its own on the number of pixels, for the whole process.
    """
    start = data[:_START]
    Image.init()
    readers: dict[str, tuple[Any, Any]] = {name: Image.OPEN[name] for name in FORMATS if name in Image.OPEN}
    if _is_heic(start):
        readers = {HEIC: (_heic_reader(field), _is_heic)}
    problem = None
    for reader, accepts in readers.values():
        if accepts is not None and accepts(start) is not True:
            continue
        try:
            return reader(io.BytesIO(data), "")
        except Image.DecompressionBombError as error:
            raise _too_large(field, error) from error
        except Exception as error:
            problem = error
    if problem is not None:
        raise _damaged(field, problem) from problem
    readable = [*readers, HEIC] if importlib.util.find_spec(HEIC_PACKAGE) is not None else readers
    raise PortraitError(
        field, "it is not an image that can be read", f"Use an undamaged file of type {', '.join(readable)}."
    )


def _is_heic(start: bytes) -> bool:
    """Whether a file that begins so is HEIC: its first box is `ftyp`, with the brands from its eighth byte on."""
    box = start[: int.from_bytes(start[:4], "big")]
    brands = {box[place : place + 4] for place in range(8, len(box), 4)}
    return box[4:8] == b"ftyp" and bool(brands & _HEIC_BRANDS) and not brands & _AVIF_BRANDS


def _heic_reader(field: str) -> Any:
    """What opens HEIC, imported for such a file only. Raises PortraitError where the package is missing or broken."""
    install = f"Run: pip install --no-deps {HEIC_PIN}, then restart; or save the photo as JPEG."
    if importlib.util.find_spec(HEIC_PACKAGE) is None:
        raise PortraitError(
            field, "it is a HEIC picture, and pillow-heif, which reads these, is not installed", install
        )
    try:
        return importlib.import_module(HEIC_PACKAGE).HeifImageFile
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PortraitError(
            field, f"it is a HEIC picture, and pillow-heif, which reads these, does not start ({reason})", install
        ) from error


def _of_several(image: Image.Image) -> tuple[str, ...]:
    """A notice where the file holds more pictures than the one that is taken.

    A phone's JPEG with depth or gain maps beside its picture (MPO) is one photo. What follows the first frame may be
    damaged, which is no reason to refuse it.
    """
    try:
        several = image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:
        several = False
    if not several:
        return ()
    used = {"TIFF": "the first page of the file", "HEIF": "the main picture of the file"}
    return (f"only {used.get(str(image.format), 'the first frame of the animation')} is used",)


def _too_large(field: str, error: Exception) -> PortraitError:
    # Some of Pillow's readers have its own limit built in, whatever ours is.
    return PortraitError(field, f"it has too many pixels for its format: {error}", "Scale it down, or save it as JPEG.")


def _damaged(field: str, error: Exception) -> PortraitError:
    # Pillow's decoders answer hostile bytes with nearly every exception there is; all of them mean the same here.
    return PortraitError(
        field,
        f"the image is damaged or incomplete ({type(error).__name__}: {str(error)[:100]})",
        "Open and save it anew in an image editor, or send another file.",
    )


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _flatten(image: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB, transparency laid over the grey that also pads photos for the second try."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if not _has_alpha(image):
        return image if image.mode == "RGB" else image.convert("RGB")
    ground = Image.new("RGBA", image.size, (*GREY, 255))
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey values of 16 or 32 bits, or floating point, as uint8; white is the smallest usual white that holds them."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    brightest = float(values.max())
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white: float = next((white for white in usual if brightest <= white), brightest)
    return (values / white * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _upright(picture: Image.Image, source: Image.Image) -> Image.Image:
    """`picture` turned as the EXIF data of `source` says. Unreadable EXIF turns nothing: the pixels are sound."""
    if source.format == "TIFF":
        return picture  # Pillow has turned it while loading, and up to version 9 leaves the tag in place
    try:
        turn = _UPRIGHT.get(source.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        turn = None
    return picture if turn is None else picture.transpose(turn)
